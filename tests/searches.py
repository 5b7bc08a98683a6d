"""What tests of sweeps share: small searches of ActFocus's settings, and a PostgreSQL server of their own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from pipeline.settings.presets import overlay
from pipeline.sweep.plan import SearchPlan, plans
from pipeline.sweep.queue import KILLED
from pipeline.sweep.workers import SearchRun, run_search, study_trials
from pipeline.workspace.processes import in_own_process
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "presets" / "smoke" / "overlay.yaml"
ALPHA, BETA, TAU = (
    f"method.weight.{name}"
    for name in ("reasoning_downweight", "redistribution_strength", "redistribution_temperature")
)


def params(folder: Path, *changes: dict[str, Any]) -> Path:
    """params.yaml with changes on top of it, written into a folder."""
    raw = read_yaml(ROOT / "params.yaml")
    for change in changes:
        raw = overlay(raw, change)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "params.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def searches(folder: Path, study: str = "actfocus", *changes: dict[str, Any], **sweep: Any) -> list[SearchPlan]:
    """A study of params.yaml with changes and settings of the sweep; any file stands for the reference policy."""
    policy = folder / "policy"
    policy.mkdir(parents=True, exist_ok=True)
    (policy / "model.safetensors").touch()
    return plans(params(folder, *changes, {"sweep": sweep}), study, policy)


def begin(plan: SearchPlan, objective: Any, count: int = 2, observer: Any = None) -> BaseProcess:
    """A run of a search in a process group of its own, as a terminal starts it."""
    process = multiprocessing.get_context("fork").Process(target=_session, args=(plan, objective, count, observer))
    process.start()
    return process


def _session(plan: SearchPlan, objective: Any, count: int, observer: Any) -> None:
    os.setsid()
    with (
        open("session.txt", "a", buffering=1, encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            run_search(SearchRun(plan, objective, observer), count)
        except BaseException:
            traceback.print_exc()
            raise


def end(process: BaseProcess, seconds: float = 40.0) -> None:
    """Wait for a run that must end well by itself."""
    process.join(seconds)
    hung = process.is_alive()
    if hung:
        kill_all(process)
    assert not hung, f"hung\n{Path('session.txt').read_text()}"
    assert process.exitcode == 0, Path("session.txt").read_text()


def kill_all(process: BaseProcess) -> None:
    """SIGKILL to a run and its workers, all at once."""
    assert process.pid is not None
    awaited(lambda: not process.is_alive() or os.getpgid(process.pid) == process.pid)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def run(plan: SearchPlan, objective: Any, count: int = 2, observer: Any = None, seconds: float = 40.0) -> None:
    """A run of a search that must end well."""
    end(begin(plan, objective, count, observer), seconds)


def trials_of(plan: SearchPlan) -> list[FrozenTrial]:
    """Read in another process: a connection to a database must not get into forked ones."""
    return in_own_process(study_trials, plan)


def trials_asked_for(plan: SearchPlan) -> list[FrozenTrial]:
    """All trials of a search that has ended: exactly those asked for are finished, and nothing was lost or drawn twice."""
    trials = trials_of(plan)
    finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert sorted(t.user_attrs["slot"] for t in finished) == list(range(plan.trials))
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert len(finished) + len(failed) == len(trials), Counter(t.state.name for t in trials)

    for trial in failed:
        assert trial.user_attrs["failure"] == KILLED
        if trial.user_attrs.get("attempt", 1) <= plan.config.sweep.retries:
            later = (t for t in trials if t.number > trial.number and t.user_attrs["slot"] == trial.user_attrs["slot"])
            again = next(later).user_attrs
            assert "retry_of" in again
            assert again.get("fixed", {}).items() >= trial.params.items()
    for trial in finished:
        assert trial.params.items() >= trial.user_attrs.get("fixed", {}).items()
    drawn = [tuple(sorted(t.params.items())) for t in trials if "retry_of" not in t.user_attrs and t.params]
    assert len(set(drawn)) == len(drawn), "a draw was repeated"

    for slot, (name, point) in enumerate(plan.draws().items()):
        chosen = next(t for t in finished if t.user_attrs["slot"] == slot)
        assert (chosen.user_attrs["baseline"], chosen.params) == (name, point)
    return trials


def binaries() -> Path | None:
    """Where PostgreSQL's server programs are; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    return next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """URL of a server that listens on a socket in a temporary folder, up to its name of a database."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # Not pytest's own folder: a socket's path is short, and the server, which refuses root, must get there.
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        account = {"user": "postgres", "group": "postgres", "extra_groups": []}

    def program(name: str, *arguments: Any) -> subprocess.Popen[bytes]:
        command = [programs / name, *map(str, arguments)]
        with open(folder / "log", "ab") as log:
            return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **account)

    try:
        made = program(
            "initdb", "-D", folder / "data", "-U", "sweep", "--auth=trust", "--locale=C", "-E", "UTF8", "--no-sync"
        ).wait()
        assert made == 0, (folder / "log").read_text()
        server = program("postgres", "-D", folder / "data", "-k", folder, "-h", "", "-F")
        try:
            awaited(lambda: (folder / ".s.PGSQL.5432").exists() and answers(folder), 30)
            yield f"postgresql+psycopg://sweep@/{{}}?host={folder}"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(url: str) -> str:
    """The URL of a new database on a PostgreSQL server, given the server's up to that name."""
    import psycopg

    name = f"test_{os.getpid()}_{time.monotonic_ns()}"
    with psycopg.connect(url.format("postgres").replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return url.format(name)


def answers(folder: Path) -> bool:
    """Whether the server of a folder takes connections."""
    import psycopg

    try:
        psycopg.connect(host=str(folder), user="sweep", dbname="postgres").close()
    except psycopg.OperationalError:
        return False
    return True


def awaited(happened: Any, seconds: float = 20.0) -> Any:
    """Wait until a function gives something true; returns that."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found


def written(log: Path) -> Sequence[list[str]]:
    """Lines of a log, in words."""
    return [line.split() for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
