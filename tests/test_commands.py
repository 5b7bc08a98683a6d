"""Stages as commands: from any folder, under any user, stopped at any time, and two at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from pipeline.settings.presets import overlay
from pipeline.workspace.files import lock
from pipeline.workspace.yaml_files import read_yaml
from tests.commands import complaints
from tests.trainings import LAKE, ROOT, TINY

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

MINE = """
import os, time
import gymnasium
from pipeline.environments.frozen_lake import FrozenLake

class Lake(FrozenLake):
    def step(self, action):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().step(action)

gymnasium.register(id="Mine-v0", entry_point=Lake)
"""
"""An environment in a module of the project's own root."""
OTHER = ["--params", "other.yaml"]
"""The same settings with another folder for what is made: these trainings have the same keys."""

DRIVER = """
import importlib.util, json, os, runpy, signal, sys, tempfile, time
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # as every stage begins
import psutil
import transformers.models.auto.modeling_auto
import pipeline.report.html, pipeline.tracking.store, pipeline.training.run
import pipeline.progress.display

class Command:
    def __init__(self, stage, *options, folder=".", user=None, **variables):
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.pid = os.fork()
        if not self.pid:
            for number, file in enumerate(self.files, start=1):
                os.dup2(file.fileno(), number)
            os.setpgid(0, 0)  # as a terminal starts it
            os.chdir(folder)
            os.environ.update(variables)
            if user is not None:
                for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
                    os.environ.pop(name, None)
                os.setreuid(user, -1)  # whom the machine takes it for; it still may read what this test may
            command = [] if importlib.util.find_spec(f"stages.{stage}") else [stage]
            sys.argv = [stage, *command, *options]
            runpy.run_module("pipeline.commands.app" if command else f"stages.{stage}", run_name="__main__")
            sys.exit()

    def workers(self):
        return psutil.Process(self.pid).children(recursive=True)

    def end(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return [code, *(os.pread(file.fileno(), 10**6, 0).decode() for file in self.files)]

def awaited(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)

def gone(processes):
    try:
        awaited(lambda: not any(p.is_running() and p.status() != "zombie" for p in processes), 10)
        return True
    except AssertionError:
        return False
"""


@pytest.fixture(scope="module")
def project(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an environment and a model of its own, both named from its root."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    shutil.copytree(directory, folder / "given")
    toy = {
        "policy": None,
        "methods": None,
        "compare": None,
        "train": {"iterations": 3},
        "evaluation": {"validation_states": 2, "validation_rollouts": 2},
        "environments": {LAKE: {"id": "mine:Mine-v0"}},
    }
    raw = overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), toy)
    raw |= {
        "policy": {"kind": "pretrained", "model": "given"},
        "methods": {"grpo": {}, "grpo_actfocus": {"weight": {"kind": "actfocus"}}},
        "bottleneck": {"groups": 8, "resamples": 100},
        "seeds": [0, 1],
        "workers": 2,
    }
    for name, out in (("params.yaml", "."), ("other.yaml", "other")):
        (folder / name).write_text(json.dumps(raw | {"out": out, "params_file": name}), encoding="utf-8")
    return folder


ELSEWHERE = """
def elsewhere(*command):
    found["elsewhere"][" ".join(command[:3:2])] = Command(*command, "--params", f"{project}/params.yaml", folder=folder).end()

elsewhere("policy")
elsewhere("rollout", *lake)
elsewhere("annotate", *lake)
elsewhere("bottleneck", *lake)
for method in ("grpo", "grpo_actfocus"):
    elsewhere("train", *lake, "--method", method)
for method in ("grpo", "grpo_actfocus", "reference"):
    elsewhere("evaluate", *lake, "--method", method)
elsewhere("intervene", *lake)
elsewhere("compare")
elsewhere("replay", *lake, "--groups", "8", "--alpha", "1", "--beta", "0")
elsewhere("decisions", *lake, "--seed", "300", "--positions", "1", "--candidates", "2", "--continuations", "2")
elsewhere("play", *lake)
"""
STOPPED = """
shutil.copytree("models/policy", "other/models/policy")
shutil.copytree("data/annotated", "other/data/annotated")
for name in ("SIGKILL", "SIGTERM", "SIGINT"):
    command = Command("rollout", *other, *lake, SLOW="30")
    awaited(lambda: len(command.workers()) >= 2)
    time.sleep(0.5)
    workers = command.workers()
    os.kill(command.pid, getattr(signal, name))
    found["stopped"][name] = [command.end(), gone(workers)]
"""
TWICE = """
shutil.rmtree(".cache/train")
grpo, actfocus = ([*lake, "--method", method] for method in ("grpo", "grpo_actfocus"))
equal = [Command("train", *grpo), Command("train", *grpo), Command("train", *other, *grpo)]
found["equal"] = [command.end() for command in equal]
found["begun"] = [log.read_text().split() for log in Path(".cache/train").glob("*/begun.log")]

killed, before = Command("train", *actfocus, SLOW="0.2"), set(Path(".cache/train").iterdir())
awaited(lambda: any(log.parent not in before and "1" in log.read_text() for log in Path(".cache/train").glob("*/begun.log")))
second = Command("train", *actfocus)
time.sleep(1)
os.kill(killed.pid, signal.SIGKILL)
found["killed"] = [killed.end(), second.end()]

logs = lambda: [log.read_text().split() for log in Path(".cache/train").glob("*/begun.log")]
made = Path("models/trained", f"{lake[1]}-grpo")
whole = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
shutil.rmtree(".cache/train")
found["saved"] = []
for iteration, name, send in (("0", "SIGTERM", os.kill), ("1", "SIGTERM", os.killpg), ("2", "SIGINT", os.killpg)):
    command = Command("train", *grpo, SLOW="0.1")
    awaited(lambda: len(logs()) == 2 and all(iteration in log for log in logs()), 300)
    workers = command.workers()
    send(command.pid, getattr(signal, name))
    found["saved"].append([name, *command.end(), gone(workers), logs()])
found["resumed"] = [Command("train", *grpo).end(), logs(), whole == {path: path.read_bytes() for path in whole}]
shutil.rmtree(next(Path(".cache/train").glob("*/result/policy")))
found["mended"] = [Command("train", *grpo).end(), logs(), whole == {path: path.read_bytes() for path in whole}]
found["policies"] = [command.end() for command in [Command("policy"), Command("policy")]]
if os.geteuid() == 0:
    shutil.rmtree(".cache/train")
    found["user"] = Command("train", *other, *actfocus, user=54321).end()
"""


@pytest.fixture(scope="module")
def found(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What stages of the project say and leave that are called from elsewhere, stopped, or called twice at once."""
    folder = tmp_path_factory.mktemp("elsewhere")
    named = {"folder": str(folder), "project": str(project), "lake": ["--environment", LAKE], "other": OTHER}
    begin = "".join(f"{name} = {value!r}\n" for name, value in named.items())
    begin += "import shutil\nfrom pathlib import Path\nfound = {'elsewhere': {}, 'stopped': {}}\n"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + begin + ELSEWHERE + STOPPED + TWICE + "print(json.dumps(found))"],
        cwd=project,
        env={k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "DVC_STAGE")}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome | {"left": [path.name for path in folder.iterdir()]}


def test_stages_work_in_the_params_files_root_wherever_they_are_called(project: Path, found: dict[str, Any]) -> None:
    for command, (code, _, error) in found["elsewhere"].items():
        assert code == 0, f"{command}\n{error[-3000:]}"
    assert found["left"] == []
    for made in (
        "models/policy/config.json",
        f"data/annotated/{LAKE}.parquet",
        f"models/trained/{LAKE}-grpo/seed-1/model.safetensors",
        f"data/evaluations/{LAKE}-reference.parquet",
        f"data/interventions/{LAKE}.json",
        "reports/index.html",
        f"reports/replay/{LAKE}/replay.json",
        f"reports/decisions/{LAKE}/decisions.json",
        ".cache/train",
        "mlflow.db",
    ):
        assert (project / made).exists(), made


def test_what_a_stage_has_made_can_be_found_from_where_it_was_called(project: Path, found: dict[str, Any]) -> None:
    _, line, _ = found["elsewhere"][f"rollout {LAKE}"]
    assert line.count("\n") == 1, "standard output is the result alone"
    assert line.startswith(f"{project}/data/trajectories/{LAKE}.parquet: ")
    assert f"Next: python -m stages.annotate --params {project}/params.yaml" in line


def test_a_root_that_is_not_there_is_named(project: Path, tmp_path: Path) -> None:
    raw = read_yaml(project / "params.yaml")
    (tmp_path / "params.yaml").write_text(json.dumps(raw | {"root": "../nowhere"}), encoding="utf-8")
    command = [sys.executable, "-m", "stages.policy", "--params", str(tmp_path / "params.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = f"{tmp_path}/params.yaml: root: '../nowhere' is not a folder, from this file's folder\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_stopped_stage_takes_its_workers_with_it_and_says_one_line(found: dict[str, Any]) -> None:
    for name, (code, output, error), gone in ((name, *how) for name, how in found["stopped"].items()):
        assert gone, f"{name}: workers go on without their stage"
        assert output == ""
        assert code == {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[name]
        said = {"SIGTERM": ["stopped"], "SIGINT": ["interrupted"], "SIGKILL": []}[name]
        assert complaints(error) == [f"{word}; run the same command again to go on" for word in said]


def test_equal_trainings_at_once_are_made_once_and_all_end_well(project: Path, found: dict[str, Any]) -> None:
    codes = [code for code, _, _ in found["equal"]]
    assert codes == [0, 0, 0], found["equal"]
    waited = rf"^train {LAKE}-grpo: another command makes the same \(process \d+: .*\); this one waits for its end$"
    assert [len(re.findall(waited, error, flags=re.M)) for _, _, error in found["equal"][:2]] in ([0, 1], [1, 0])
    assert found["begun"] == [["0", "1", "2"]] * 2, "an iteration was made by two commands"
    for out in (project, project / "other"):
        for seed in ("seed-0", "seed-1"):
            assert (out / "models" / "trained" / f"{LAKE}-grpo" / seed / "model.safetensors").exists()
        assert len(read_yaml(out / "data" / "curves" / f"{LAKE}-grpo.json")["seeds"]["0"]) == 3


def test_a_stage_that_is_asked_to_stop_finishes_the_iterations_at_work_and_no_others(found: dict[str, Any]) -> None:
    for number, (name, code, output, error, gone, begun) in enumerate(found["saved"]):
        assert gone, f"{name}: workers go on without their stage"
        said = {"SIGTERM": "stopped", "SIGINT": "interrupted"}[name]
        assert (code, output) == ({"SIGTERM": 143, "SIGINT": 130}[name], "")
        assert complaints(error) == [f"{said}; run the same command again to go on"]
        assert all(log == ["0", "1", "2"][: len(log)] and len(log) > number for log in begun)
    (code, _, error), begun, equal = found["resumed"]
    assert code == 0, error
    assert begun == [["0", "1", "2"]] * 2, "an iteration was made twice"
    assert equal


def test_a_finished_training_whose_policy_is_lost_is_made_again(found: dict[str, Any]) -> None:
    (code, _, error), begun, equal = found["mended"]
    assert code == 0, error
    assert sorted(begun) == [["0", "1", "2"], ["0", "1", "2"] * 2]
    assert equal


def test_a_policy_that_two_commands_make_at_once_is_whole(project: Path, found: dict[str, Any]) -> None:
    assert [code for code, _, _ in found["policies"]] == [0, 0], found["policies"]
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (project / "models" / "policy" / file).exists()
    assert not list((project / "models").glob("*.partial"))


def test_a_killed_training_keeps_no_lock(project: Path, found: dict[str, Any]) -> None:
    (killed, *_), (code, _, error) = found["killed"]
    assert (killed, code) == (-9, 0), error
    assert (project / "models" / "trained" / f"{LAKE}-grpo_actfocus" / "seed-1" / "model.safetensors").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_user_without_name_and_home_trains_under_the_number(project: Path, found: dict[str, Any]) -> None:
    code, _, error = found["user"]
    assert code == 0, error
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as store:
        assert ("54321",) in store.execute("SELECT value FROM tags WHERE key = 'mlflow.user'").fetchall()


def test_what_waits_for_a_lock_is_told_once_and_then_has_it(tmp_path: Path) -> None:
    told: list[str] = []
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from pipeline.workspace.files import lock\n"
            "with lock(Path(sys.argv[1])): print(flush=True); time.sleep(60)",
            str(tmp_path / "lock"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(Timeout), lock(tmp_path / "lock", wait=False):
        pass

    def waiting() -> None:
        told.append("waiting")
        holder.kill()

    with lock(tmp_path / "lock", waiting=waiting):
        assert told == ["waiting"]
    holder.wait()


def test_a_lock_ends_with_its_holder_though_a_process_that_it_has_forked_lives(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from pipeline.workspace.files import lock\n"
        "with lock(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.kill()
    try:
        with lock(tmp_path / "lock"):  # pytest's own limit would end a wait for the child
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


STARTER = """
import subprocess, sys, time
child = "import time; from pipeline.commands.cli import run; run(lambda: print('begun', flush=True) or time.sleep(60))"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""


def test_a_stage_that_dvc_runs_ends_with_dvc(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with said.open("w") as file:
        starter = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=ROOT,
            env={**os.environ, "DVC_STAGE": "train"},
            stdout=subprocess.PIPE,
            stderr=file,
        )
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"begun\n"
    starter.kill()
    assert starter.stdout.read() == b""  # to its end: the stage has closed it, too
    starter.wait()
    assert said.read_text() == "stopped; run the same command again to go on\n"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("make"), reason="only root can be somebody else")
def test_make_gives_a_user_without_a_name_one_and_a_home(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "Makefile", tmp_path)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "--eval", "asked: ; @echo $$USER $$HOME", "asked"],
        cwd=tmp_path,
        env={"PATH": os.defpath},
        user=54321,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"54321 {tmp_path}/.cache/home\n", done.stderr


def test_a_server_ends_when_the_process_that_started_it_is_killed() -> None:
    from pipeline.report.screenshots import SERVED

    server = "import os, sys, time; os.fork(); print(os.getpid(), flush=True); time.sleep(60)"
    command = ["sh", "-c", SERVED, "sh", sys.executable, "-c", server]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    process.stdin.close()  # as the kernel does for a killed process
    assert process.stdout.read() == b""
    process.wait()
