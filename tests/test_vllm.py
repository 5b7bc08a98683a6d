"""Trainings and mistakes with a vLLM server: `make test-vllm`. What any engine must do is in test_engine_conformance.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from pipeline.model.policy import Policy
from pipeline.rollout import vllm_client, vllm_server
from pipeline.rollout.engine import Request, Sampling
from pipeline.rollout.making import make_engine
from pipeline.rollout.vllm_engine import VllmEngine
from pipeline.rollout.vllm_weights import HEAD_FILE
from pipeline.settings.params import Config
from pipeline.settings.presets import overlay
from pipeline.training.module import PolicyGradient
from pipeline.workspace.errors import UserError
from pipeline.workspace.finite import NumericsError
from pipeline.workspace.yaml_files import read_yaml
from tests.engine_cases import STOP, encode, random_policy
from tests.test_dag import METHODS, OUT, clone, edit, repro
from tests.test_engine_conformance import assert_scored
from tests.trainings import LAKE, TINY, configured, fit

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[1]
PYTHON = str(ROOT / ".venv-vllm/bin/python")
PATIENCE = 1800.0
"""Seconds; a server takes 20 on two idle cores."""
SMALL = {"hidden_size": 64, "heads": 2}
"""Heads of 32 numbers, the smallest that vLLM has on a processor."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return random_policy("qwen2", 32, tmp_path_factory.mktemp("qwen2") / "policy")


def with_vllm(folder: Path, engine: dict[str, Any] | None = None, **changes: Any) -> Config:
    """Blocks of 32 tokens, so that short dialogues have some that are kept."""
    server = {} if (engine or {}).get("url") else {"python": PYTHON, "arguments": ["--block-size=32"]}
    section = {
        "kind": "vllm",
        "weights": str(folder / "weights"),
        "patience_seconds": PATIENCE,
        **server,
        **(engine or {}),
    }
    return configured({"rollout": {"cache_gigabytes": 0.1, "engine": section}, **changes})


# ------------------------------------------------------------------------------------------- trainings

STEPS = {"train": {"iterations": 4}, "method_defaults": {"learning_rate": 3e-3}}


def begun(policy: Policy, folder: Path, **changes: Any) -> PolicyGradient:
    return PolicyGradient(with_vllm(folder, **{**STEPS, **changes}), LAKE, "grpo", 0, policy)


def test_after_three_updates_vllm_samples_from_the_trained_weights(policy: Policy, tmp_path: Path) -> None:
    """The largest error of an episode is far below what passes for rounding; entropies are there, and ratios begin at 1."""
    correction = {"train": {"iterations": 4, "correction": {"kind": "truncate"}}}
    module = fit(begun(policy, tmp_path, **correction), 4)
    assert len(module.curve) == 4
    assert module.curve[-1]["kl_reference"] > 1e-4, "it has moved"
    for row in module.curve:
        assert 0 < row["sampler_difference"] < 1e-4
        assert row["sampling_error"] < 1e-4
        assert row["correction_touched"] == 0
        assert 0 < row["entropy"] < np.log(len(policy.tokenizer))
    last = module.last_episodes
    assert last is not None
    assert not np.isnan(last.entropy).any()
    assert set(last.episodes["policy_version"]) == {3}


def weights_stay(module: PolicyGradient, patch: pytest.MonkeyPatch) -> None:
    """The server says that it has taken them."""
    patch.setattr(vllm_client.VllmClient, "_reload", lambda *_: None)


def cache_stays(module: PolicyGradient, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vllm_client.VllmClient, "reset_prefix_cache", lambda *_: None)


def head_stays(module: PolicyGradient, patch: pytest.MonkeyPatch) -> None:
    """As if a tied head had been left as it was arranged for the kernels at first."""
    write, first = vllm_client.write_weights, dict[str, torch.Tensor]()

    def with_the_first_head(policy: Policy, folder: Path) -> None:
        write(policy, folder)
        file = folder / HEAD_FILE
        save_file(first or load_file(file), file, {"format": "pt"})
        first.update(load_file(file))

    patch.setattr(vllm_client, "write_weights", with_the_first_head)


def warmer(module: PolicyGradient, patch: pytest.MonkeyPatch) -> None:
    complete = vllm_client.VllmClient.complete

    def at_another(self: Any, ids: Any, most: int, sampling: Sampling, ends: Any) -> Any:
        return complete(self, ids, most, Sampling(sampling.temperature * 0.9, sampling.stop), ends)

    patch.setattr(vllm_client.VllmClient, "complete", at_another)


@pytest.mark.parametrize("fault", [weights_stay, cache_stays, head_stays, warmer])
def test_a_server_that_samples_from_something_else_is_noticed(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    module = begun(policy, tmp_path)
    fault(module, monkeypatch)
    with pytest.raises(NumericsError, match=r"^iteration [01]: sampled tokens do not have the log-probabilities"):
        fit(module, 2)


# ------------------------------------------------------------------------------------------- a server that goes away


def server_of(engine: VllmEngine) -> psutil.Process:
    """The server's first process, once it is there."""
    assert engine.client.server is not None
    return psutil.Process(engine.client.server.pid)


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process], seconds: float = 60.0) -> bool:
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_a_server_killed_in_the_middle_of_a_rollout_is_replaced(policy: Policy, tmp_path: Path) -> None:
    """Nothing is lost: every request has its answer, of the right weights; nothing of the first server is left."""
    engine = make_engine(with_vllm(tmp_path), policy, 4)
    assert isinstance(engine, VllmEngine)
    with torch.no_grad():
        policy.head.weight *= 0.9  # not what a server is started with
    engine.sync(policy, 5)
    first, answered = family(server_of(engine)), 0
    assert len(first) > 1
    requests = [Request(encode(policy, "player 0 1"), np.random.default_rng(i).random(60)) for i in range(12)]

    def follow(number: int, answer: Any) -> None:
        nonlocal answered
        answered += 1
        if answered == 3:
            first[0].kill()

    answers = engine.generate(requests, Sampling(1.0, STOP), follow)
    assert len(answers) == answered == 12
    assert {answer.policy_version for answer in answers} == {5}
    assert gone(first)
    assert server_of(engine).pid != first[0].pid


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from pipeline.model.loading import load_policy
from pipeline.rollout.making import make_engine
from tests.test_vllm import with_vllm

policy = load_policy(Path(sys.argv[1]))
engine = make_engine(with_vllm(Path(sys.argv[2])), policy, 2)
engine.sync(policy, 0)
print(engine.client.server.pid, flush=True)
time.sleep(600 if sys.argv[3] == "killed" else 0)
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_server_ends_with_the_process_that_started_it(policy: Policy, tmp_path: Path, how: str) -> None:
    policy.save(tmp_path / "policy")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "policy"), str(tmp_path), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = family(psutil.Process(int(process.stdout.readline())))
        if how == "killed":
            process.send_signal(signal.SIGKILL)
        assert process.wait(120) == (-signal.SIGKILL if how == "killed" else 0)
    assert gone(server)
    if how == "ended":
        assert list((tmp_path / "weights").iterdir()) == []


# ------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def other_server(
    policy: Policy, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A server that somebody else has started."""
    arguments, developing = request.param
    policy.save(tmp_path / "policy")
    plain = vllm_server.server_environment

    def environment(threads: int, eager: bool) -> dict[str, str]:
        return plain(threads, eager) | {"VLLM_SERVER_DEV_MODE": str(int(developing))}

    monkeypatch.setattr(vllm_server, "server_environment", environment)
    section = with_vllm(tmp_path).rollout.engine
    options = [
        "--enforce-eager",
        "--kv-cache-memory-bytes=100000000",
        "--max-model-len=256",
        "--dtype=float32",
        *arguments,
    ]
    server = vllm_server.VllmServer(section, tmp_path / "policy", options, 1)  # type: ignore[arg-type]
    vllm_server.wait_until_ready(server.url, PATIENCE, server)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("other_server", "said"),
    [
        (
            ([], False),
            r"vLLM 0\.32\S* at \S+ lacks /pause, .*; needed is vLLM 0\.32 or later, started with VLLM_SERVER_DEV",
        ),
        ((["--served-model-name=other"], True), r"vLLM at \S+ serves other; allowed: --served-model-name actfocus"),
    ],
    indirect=["other_server"],
    ids=["no interface", "another name"],
)
def test_a_server_that_cannot_be_used_is_refused_in_one_line(
    policy: Policy, tmp_path: Path, other_server: Any, said: str
) -> None:
    config = with_vllm(tmp_path, {"url": other_server.url}, workers=1)
    with pytest.raises(UserError, match=said) as raised:
        make_engine(config, policy).sync(policy, 0)
    assert "\n" not in str(raised.value)


@pytest.fixture
def served(policy: Policy, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """`actfocus serve`, of a params file whose changes these are."""
    url = f"http://127.0.0.1:{vllm_server._free_port()}"
    section = {"kind": "vllm", "url": url, "weights": str(tmp_path / "weights"), "patience_seconds": PATIENCE}
    changes = {"workers": 1, "rollout": {"engine": section, "cache_gigabytes": 0.1}}
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), changes), file)
    policy.save(tmp_path / "models/policy")
    command = [sys.executable, "-m", "pipeline.commands.app", "serve", "--python", PYTHON]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        vllm_server.wait_until_ready(url, PATIENCE)
        yield changes
        ours = family(psutil.Process(process.pid))
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert gone(ours)


def test_a_server_that_runs_already_is_sampled_from_unless_its_model_is_another(
    policy: Policy, tmp_path: Path, served: dict[str, Any]
) -> None:
    config = configured(served)
    engine = make_engine(config, policy)
    engine.sync(policy, 7)
    request = Request(encode(policy, "Up"), np.zeros(3))
    (answer,) = engine.generate([request], Sampling(1.0, STOP))
    assert answer.policy_version == 7
    assert_scored(policy, request, answer, 1.0)
    make_engine(config, policy).sync(policy, 8)
    (answer,) = engine.generate([request], Sampling(1.0, STOP))
    assert answer.policy_version == 7, "another has sent its weights, and these are sent again"
    wider = random_policy("qwen2", 64, tmp_path / "wider")
    with pytest.raises(UserError, match=r"cannot take the policy's weights: ") as raised:
        make_engine(config, wider).sync(wider, 8)
    assert "\n" not in str(raised.value)


def test_a_server_that_is_away_is_waited_for_as_long_as_it_is_said(policy: Policy, tmp_path: Path) -> None:
    config = with_vllm(tmp_path, {"url": "http://127.0.0.1:9", "patience_seconds": 1.0}, workers=1)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"vLLM at http://127\.0\.0\.1:9 has not answered for 1 seconds .*the same command"
    ):
        make_engine(config, policy).sync(policy, 0)
    assert 1 <= time.monotonic() - began < 30


def test_what_vllm_cannot_serve_is_said_in_its_own_words(tmp_path: Path) -> None:
    """Heads of 8 numbers."""
    small = random_policy("qwen2", 8, tmp_path / "policy")
    with pytest.raises(UserError, match=r"^rollout\.engine: vLLM has ended: .*(head|Head)") as raised:
        make_engine(with_vllm(tmp_path), small).sync(small, 0)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------- all of it


@pytest.mark.dag
def test_the_smoke_preset_runs_with_vllm(tmp_path: Path) -> None:
    """End to end; a table that says that it is not to be had again byte for byte."""
    folder = clone(tmp_path / "clone")
    engine = {"kind": "vllm", "python": PYTHON}

    def change(overlay: Any) -> None:
        overlay["rollout"] |= {"engine": engine, "cache_gigabytes": 0.1}
        overlay["policy"] |= SMALL

    edit(folder, change)
    assert len(repro(folder)) == 6 + 2 * len(METHODS) + 1
    said = (folder / OUT / "reports/comparison.md").read_text()
    assert said.count("vLLM sampled, with random numbers of its own") == 1
