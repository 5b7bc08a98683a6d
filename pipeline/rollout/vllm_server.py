"""A vLLM server of this process's own: started from a folder of weights, ended with the process."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter

from pipeline.settings.engine import VllmSection
from pipeline.workspace.addresses import redacted, shown
from pipeline.workspace.errors import UserError
from pipeline.workspace.processes import start_with_parent

MODEL = "actfocus"
"""What a server calls the model that it serves: one that serves another is not meant for this."""
_SERVERS: dict[tuple[str, ...], VllmServer] = {}
"""This process's own, by what they were started with: starting one takes as long as many an evaluation."""
GRACE_SECONDS = 10.0
"""After which a server that does not end by itself is killed."""


class ServerAway(Exception):
    """A server does not answer, or has not the weights that it should have; ``str()`` says which."""


class VllmServer:
    """A server on a free port of 127.0.0.1. It takes seconds to answer: see ``wait_until_ready``.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, section: VllmSection, folder: Path, options: Sequence[str], threads: int) -> None:
        require_installed(section)
        self.log = folder.with_suffix(".log")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = server_command(section.python, "127.0.0.1", port, folder, [*options, *section.arguments])
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(threads, "--enforce-eager" in options),
                start_new_session=True,  # its own processes are in a group of which all are ended
                preexec_fn=start_with_parent(signal.SIGTERM),
            )
        self.close = Finalize(self, _end, (self._process, folder, self.log), exitpriority=10)
        """End the server and all its processes; called at this process's end, too."""

        self.ready = False
        """Whether it has answered."""

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def why_ended(self) -> str:
        """The first error that its log names, or else the log's last line."""
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = log.splitlines() or ["without a word"]
        told = [line for line in lines if " WARNING " not in line and " INFO " not in line]
        named = re.findall(r"\b\w*(?:Error|Exception): .+", "\n".join(told))
        return f"{redacted((named or lines[-1:])[0].strip())[:300]} ({self.log})"


def require_installed(section: VllmSection) -> None:
    """Refuse a section whose server would have to be started without vLLM, with a UserError."""
    if section.url is None and not Path(section.python).exists():
        raise UserError(f"rollout.engine.python: {section.python} is not there; `make install-vllm` installs vLLM")


def own_server(
    section: VllmSection, shape: str, write: Callable[[Path], None], options: Sequence[str], threads: int
) -> VllmServer:
    """This process's server of a model of some ``shape``, started if it does not run.

    Args:
        section: how it is started.
        shape: the model's configuration, as text.
        write: puts such a model, with its tokenizer, into a folder.
        options: more arguments.
        threads: of the processor.

    Raises:
        UserError: vLLM is not installed.
    """
    key = (shape, *options, *section.arguments, section.python, str(threads))
    server = _SERVERS.get(key)
    if server is None or not server.runs:
        if server is not None:
            server.close()
        folder = Path(section.weights) / f"started-{os.getpid()}-{secrets.token_hex(4)}"
        write(folder)
        server = _SERVERS[key] = VllmServer(section, folder, options, threads)
    return server


def server_command(python: str, host: str, port: int, folder: Path, options: Sequence[str]) -> list[str]:
    """The command of a server of the model in a folder; the last of equal options counts."""
    return [
        *(str(Path(python).absolute()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", host, "--port", str(port), "--model", str(folder.absolute()), "--served-model-name", MODEL),
        *("--logprobs-mode", "processed_logprobs"),  # of the tempered distribution that tokens are drawn from
        *("--generation-config", "vllm"),  # no top-k, top-p or penalties of the model's own
        "--enable-scale-out",  # token ids in, token ids out, with the name of the weights
        *("--enable-prefix-caching", "--enable-prompt-tokens-details", "--uvicorn-log-level", "warning"),
        *options,
    ]


def session(at_once: int = 1) -> requests.Session:
    """For so many requests at a time, which go to the server itself, whatever proxy there is.

    They carry the key that a server asks for that was started with VLLM_API_KEY, or with ``--api-key``.
    """
    found = requests.Session()
    found.trust_env = False
    key = os.environ.get("VLLM_API_KEY")
    if key:
        found.headers["Authorization"] = f"Bearer {key}"
    found.mount("http", HTTPAdapter(pool_maxsize=at_once))
    return found


def wait_until_ready(url: str, seconds: float, server: VllmServer | None = None) -> None:
    """Wait until the server at an address answers; ``server`` is it, where it is this process's own.

    Raises:
        ServerAway: it had answered, and has ended.
        UserError: it has ended without an answer, or not answered in time.
    """
    deadline, pause = time.monotonic() + seconds, 0.1
    with session() as asking:
        while not _answers(asking, url):
            if server is not None and not server.runs:
                if server.ready:
                    raise ServerAway("it has ended")
                raise UserError(f"rollout.engine: vLLM has ended: {server.why_ended()}")
            if time.monotonic() > deadline:
                raise UserError(
                    f"rollout.engine: vLLM at {shown(url)} has not answered for {seconds:g} seconds (patience_seconds); what is "
                    "finished is kept, and the same command goes on from there"
                )
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
    if server is not None:
        server.ready = True


def _answers(asking: requests.Session, url: str) -> bool:
    """Whether a server is there and well."""
    try:
        return asking.get(f"{url}/health", timeout=10).ok
    except requests.RequestException:
        return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def server_environment(threads: int, eager: bool) -> dict[str, str]:
    """Of a server: nothing of this project's is imported there, nothing is asked of a hub, and if ``eager`` nothing compiled."""
    mine = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**mine, **({"TORCHDYNAMO_DISABLE": "1"} if eager else {})} | {
        "VLLM_SERVER_DEV_MODE": "1",  # weights can be updated
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two servers would be bound to the same cores
        "OMP_NUM_THREADS": str(threads),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # no connection is closed while an update is computed
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _end(process: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
    """Ask a server to end, then kill what is left of its group; the log of one that has ended by itself is kept."""
    shutil.rmtree(folder, ignore_errors=True)
    if process.poll() is None:
        log.unlink(missing_ok=True)
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
