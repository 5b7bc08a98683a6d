"""Work that is asked to stop: at its next save, once for a whole process group, and at once where it is asked again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.workspace.processes import Tell, run_in_processes, run_together
from pipeline.workspace.stopping import PARENT_ENDED, Stopped, asked, stop_if_asked

ROOT = Path(__file__).parents[1]
UNITS = 200


def until_there(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def work(task: tuple[Path, float], report: Tell) -> None:
    """Units of so many seconds that each begin and are saved."""
    log, seconds = task
    for _ in range(UNITS):
        with log.open("a") as file:
            print("begun", file=file, flush=True)
            time.sleep(seconds)
            print("saved", file=file, flush=True)
        stop_if_asked()


def begun(logs: list[Path]) -> bool:
    return all(log.exists() and "begun" in log.read_text() for log in logs)


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    return [tmp_path / "one", tmp_path / "two"]


@pytest.fixture
def command(logs: list[Path], request: pytest.FixtureRequest) -> int:
    """A process, in a group of its own, that has two units at work in two others and a third task waiting."""
    seconds = getattr(request, "param", 0.3)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        tasks = {log.name: (log, seconds) for log in [*logs, logs[0].with_name("three")]}
        try:
            run_in_processes(work, tasks, 2, "work", saved="units")
        except Stopped as stopped:
            os._exit(stopped.number)
        except BaseException:
            os._exit(1)
        os._exit(0)
    until_there(lambda: begun(logs))
    return child


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_units_at_work_are_finished_and_no_others_begun(
    command: int, logs: list[Path], number: signal.Signals, to_group: bool
) -> None:
    (os.killpg if to_group else os.kill)(command, number)
    assert exit_code(command) == number
    for log in logs:
        said = log.read_text().split()
        assert said.count("begun") == said.count("saved") < UNITS
    assert not logs[0].with_name("three").exists()


@pytest.mark.parametrize("command", [600.0], indirect=True)
def test_asked_again_it_stops_at_once(command: int) -> None:
    workers = psutil.Process(command).children(recursive=True)
    os.killpg(command, signal.SIGTERM)
    time.sleep(1.0)
    os.killpg(command, signal.SIGTERM)  # as make passes it on
    time.sleep(1.0)
    assert all(map(alive, workers))
    os.killpg(command, signal.SIGINT)
    assert exit_code(command) == signal.SIGINT
    until_there(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize("command", [600.0], indirect=True)
def test_a_killed_command_leaves_no_worker(command: int) -> None:
    workers = psutil.Process(command).children(recursive=True)
    os.kill(command, signal.SIGKILL)
    assert exit_code(command) == -signal.SIGKILL
    until_there(lambda: not any(map(alive, workers)))


def test_processes_that_wait_for_one_another_learn_of_it_together(tmp_path: Path) -> None:
    """A flag that is set in the process on top is seen two forks below."""

    def below(rank: int) -> bool:
        (tmp_path / str(rank)).touch()
        until_there(asked)
        return True

    def task(_: int, report: Tell) -> bool:
        return run_together(below, 2)

    child = os.fork()
    if not child:
        try:
            run_in_processes(task, {"team": 0}, 1, "work", saved="units")
        except Stopped as stopped:
            os._exit(stopped.number)
        os._exit(1)
    until_there(lambda: (tmp_path / "1").exists() and (tmp_path / "0").exists())
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == signal.SIGTERM


COMMAND = """
import sys, time
from pipeline.commands.cli import run
from pipeline.workspace.stopping import stop_if_asked, until_saved

def main() -> str:
    with until_saved():
        print("begun", flush=True)
        for _ in range(100):
            time.sleep(0.3)
            stop_if_asked()
    return "done"

run(main)
"""


ORPHAN = """
import os, time
from pipeline.commands.cli import run

parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.01)
run(lambda: "done")
"""


def test_a_stage_whose_dvc_ended_before_it_began_does_not_begin() -> None:
    variables = {**os.environ, "DVC_STAGE": "train"}
    command = [sys.executable, "-c", ORPHAN]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", "stopped; run the same command again to go on\n")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "interrupted"), (PARENT_ENDED, 143, "stopped")],
)
def test_a_command_that_has_saved_says_one_line(number: signal.Signals, code: int, said: str) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "begun\n"
    command.send_signal(number)
    output, error = command.communicate(timeout=120)
    assert (command.returncode, output) == (code, "")
    assert error == f"{said}; run the same command again to go on\n"
