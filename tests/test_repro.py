"""make repro, which adds seeds until it is decided: a real DVC pipeline whose trainings are made up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.commands.repro import main, settings_hash
from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.workspace.files import read_record, write_json, write_record, write_text
from pipeline.workspace.layout import Layout
from pipeline.workspace.yaml_files import read_yaml, yaml_text
from tests.looks_cases import UNTIL

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

ROOT = Path(__file__).parents[1]
PIPELINE = """
stages:
  sources:
    cmd: python -m stages.sources
    always_changed: true
    outs: [{data/sources: {persist: true}}]
  train:
    cmd: python toy.py train
    deps: [data/sources/seeds.json]
    outs: [data/evaluations]
  compare:
    cmd: python toy.py compare
    deps: [data/sources/seeds.json, data/evaluations]
    outs: [reports]
"""
TOY = """
import os, sys, time
from pathlib import Path
from pipeline.analysis.looks import look_entry, looks_of
from pipeline.commands.cli import configured
from pipeline.workspace.files import write_json, write_text
from tests.looks_cases import planted

config, layout, _ = configured("params.yaml")
cache = Path(".cache/train")
cache.mkdir(parents=True, exist_ok=True)
if sys.argv[1] == "train":
    for seed in config.seeds:
        if not (cache / f"{seed}").exists():
            time.sleep(float(os.environ.get("SLOW", "0")))
            with open(".cache/trained", "a") as log:
                print(seed, file=log)
            (cache / f"{seed}").touch()
    write_json(Path("data/evaluations/seeds.json"), list(config.seeds))
else:
    looks = looks_of(config, planted(config, {"grpo_actfocus": float(os.environ["DIFFERENCE"])}, 1))
    write_json(layout.comparison, {"look": look_entry(config.seeds_until, looks)})
    write_text(layout.reports / "comparison.txt", f"the table of {len(config.seeds)} seeds\\n")
"""


def project(folder: Path, changes: dict[str, Any]) -> Path:
    """A DVC project with the settings of params.yaml, two methods of it, and a rule for its seeds."""
    folder.mkdir()
    raw = read_yaml(ROOT / "params.yaml")
    pair = {"uniform": {"grpo_actfocus": "grpo"}, "control": {}, "primary": "grpo_actfocus"}
    methods = {name: raw["methods"][name] for name in ("grpo", "grpo_actfocus")}
    raw |= {"methods": methods, "compare": {**raw["compare"], **pair}, "seeds": UNTIL}
    (folder / "params.yaml").write_text(yaml_text(overlay(raw, changes)))
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "toy.py").write_text(TOY)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["dvc", "init", "-q"], cwd=folder, env=variables(), check=True)
    return folder


def variables(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "ACTFOCUS_KERNELS": "off",
        "DIFFERENCE": "0.15",
        **more,
    }


COMMAND = [sys.executable, "-m", "pipeline.commands.app", "repro"]


def repro(folder: Path, *command: str, **more: str) -> str:
    done = subprocess.run(
        command or COMMAND, cwd=folder, env=variables(**more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_seeds_are_added_until_it_is_decided_killed_in_between_or_not(tmp_path: Path) -> None:
    straight, killed = (project(tmp_path / name, {}) for name in ("straight", "killed"))
    shown = repro(straight)
    numbers = re.findall(r"^Look (\d) of 7: (\d+) of at most 30 seeds", shown, flags=re.M)
    assert numbers == [(str(n), str(2 + 4 * n)) for n in range(1, len(numbers) + 1)]
    assert len(numbers) > 1, "it should not be decided at once"
    assert len(numbers) < 4
    seeds = int(numbers[-1][1])
    assert shown.rstrip().endswith(f"the table of {seeds} seeds")
    assert "judged at " in shown
    assert (straight / ".cache/trained").read_text().split() == [str(seed) for seed in range(seeds)], "each one once"

    process = subprocess.Popen(
        COMMAND, cwd=killed, env=variables(SLOW="0.3"), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline, log = time.monotonic() + 240, killed / ".cache/trained"
    while time.monotonic() < deadline and not (log.exists() and "7\n" in log.read_text()):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=60)  # while one of them is there, DVC holds its lock for it
    assert 8 <= len(log.read_text().split()) < 10, "killed within the second batch"
    shown = repro(killed)
    assert re.findall(r"^Look (\d)", shown, flags=re.M)[0] == "2", "it goes on where it was"
    assert set(log.read_text().split()) == {str(seed) for seed in range(seeds)}
    for name in ("data/looks.json", "reports/comparison.json", "data/sources/seeds.json", "hypotheses.yaml"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name

    before = (straight / "data/looks.json").read_bytes()
    assert repro(straight).count("Running stage") == 1, "nothing but the stage that always runs"
    assert (straight / "data/looks.json").read_bytes() == before
    assert "`make repro` adds more" in repro(straight, "dvc", "repro", "-f", "-s", "sources")
    assert read_record(straight / "data/sources/seeds.json") == {"seeds": list(range(seeds))}


def test_asked_to_stop_it_waits_for_the_stage_at_work_and_says_one_line(tmp_path: Path) -> None:
    folder = project(tmp_path / "stopped", {})
    with subprocess.Popen(COMMAND, cwd=folder, env=variables(SLOW="0.3"), stderr=subprocess.PIPE, text=True) as process:
        deadline, log = time.monotonic() + 240, folder / ".cache/trained"
        while time.monotonic() < deadline and not log.exists():
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=240)[1]
    assert process.returncode == 143
    assert error.splitlines()[-1] == "stopped; run the same command again to go on"
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert not (folder / "reports").exists(), "it went on with the next stage"


def test_looks_begin_anew_where_trainings_or_played_episodes_would_be_others() -> None:
    def key(**changes: Any) -> str:
        return settings_hash(parse(overlay(read_yaml(ROOT / "params.yaml"), changes)))

    before = key()
    assert key(seeds=[7, 8], workers=1, compare={"smallest_effect": 0.2}, report={"states": 1}) == before
    others = (
        {"train": {"iterations": 3}},
        {"methods": {"grpo": {"learning_rate": 1e-3}}},
        {"evaluation": {"states": 8}},
    )
    assert len({before, *(key(**changes) for changes in others)}) == 4


@pytest.mark.parametrize(("same", "looks"), [(True, ["2"]), (False, ["1", "2"])])
def test_seeds_in_effect_are_gone_on_with_if_they_are_of_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], same: bool, looks: list[str]
) -> None:
    """The pipeline itself is left out: what it would write at ten seeds and at six is there."""
    raw = overlay(read_yaml(ROOT / "params.yaml"), {"methods": {"ppo": {"learning_rate": 1e-3}}}) | {"seeds": UNTIL}
    (tmp_path / "params.yaml").write_text(yaml_text(raw))
    monkeypatch.chdir(tmp_path)
    layout = Layout(Path("."))
    settings = settings_hash(parse(raw if same else raw | {"comparison": "another"}))
    write_record(layout.looks, {"settings": settings, "looks": []})
    write_record(layout.seeds_in_effect, {"seeds": list(range(10))})
    write_text(layout.reports / "comparison.txt", "the table\n")

    def written(_: Path) -> None:
        count = len(read_record(layout.seeds_in_effect)["seeds"])
        look = {
            "number": 1 + count // 10,
            "of": 7,
            "seeds": count,
            "at_most": 30,
            "level": 0.01,
            "decided": count == 10,
        }
        write_json(layout.comparison, {"look": {**look, "next_seeds": 10, "looks": [count]}})

    monkeypatch.setattr("pipeline.commands.repro.reproduce", written)
    assert main("params.yaml") == "the table"
    assert re.findall(r"^Look (\d)", capsys.readouterr().out, flags=re.M) == looks
    assert read_record(layout.looks) == {"settings": settings_hash(parse(raw)), "looks": [10]}


def test_a_list_of_seeds_is_run_once(tmp_path: Path) -> None:
    folder = project(tmp_path / "list", {"seeds": None} | {"seeds": [5, 6]})
    (folder / "dvc.yaml").write_text(PIPELINE.partition("  compare:")[0])
    (folder / "reports").mkdir()
    (folder / "reports/comparison.txt").write_text("the table\n")
    assert repro(folder).rstrip().endswith("the table")
    assert json.loads((folder / "data/evaluations/seeds.json").read_text()) == [5, 6]
    assert read_record(folder / "data/sources/seeds.json") == {"seeds": [5, 6]}
    assert not (folder / "data/looks.json").exists()
