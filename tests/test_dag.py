"""The real DAG at toy size, in temporary clones, by the commands that a user types."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.settings.presets import resolve_preset
from pipeline.workspace.yaml_files import read_yaml
from tests.clones import ROOT, call, clone, commit, environment
from tests.commands import complaints, forked_stages
from tests.trainings import left

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

PIPELINE = "presets/smoke/dvc.yaml"
PARAMS = "presets/smoke/params.yaml"
OUT = Path("presets/smoke")
METHODS = ("ppo", "grpo", "grpo_actfocus")


def repro(folder: Path, *options: str) -> list[str]:
    """Run ``dvc repro``; returns the names of the stages that ran, or with ``--dry`` would have, after the one that always
    does."""
    output = call(folder, "dvc", "repro", *options, PIPELINE).stdout
    first, *ran = re.findall(r"Running stage '[^']*:([^':]+)'", output)
    assert first == "sources@params"
    if "--dry" not in options:
        assert output.count("Next: ") == 1 + len(ran), "a stage ends with its result and the next command"
    assert all(f"--params {PARAMS}" in command for command in re.findall(r"Next: python -m .*", output))
    return ran


def digests(folder: Path) -> dict[str, str]:
    """Hash of every output but wall-clock times, what is drawn from them, and run ids."""
    found = {}
    for path in sorted((folder / OUT).rglob("*")):
        name = path.relative_to(folder / OUT).as_posix()
        timed = name.startswith(("data/timings", "data/runs"))
        if path.is_file() and name.split("/")[0] in ("data", "models", "reports") and not timed:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def edit(folder: Path, change: object) -> None:
    """Change the preset's overlay, and make its params file anew."""
    yaml = YAML()
    path = folder / OUT / "overlay.yaml"
    values = yaml.load(path.read_text())
    change(values)  # type: ignore[operator]
    with path.open("w") as stream:
        yaml.dump(values, stream)
    resolve_preset("smoke", folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two clones in which the smoke preset has run, at the same time: by DVC, and stage by stage."""
    one, two = (clone(tmp_path_factory.mktemp("clone") / name) for name in ("one", "two"))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(stage_by_stage, two)
        call(one, sys.executable, "-m", "pipeline.commands.app", "preset", "--name", "smoke")
        assert len(repro(one)) == 6 + 2 * len(METHODS) + 1
        other.result()
    return one, two


def stage_by_stage(folder: Path) -> None:
    played = ["--params", PARAMS, "--environment", "frozen_lake"]
    commands = [
        ["preset", "--name", "smoke"],
        ["sources", "--params", PARAMS],
        ["policy", "--params", PARAMS],
        *([stage, *played] for stage in ("rollout", "annotate", "bottleneck")),
        *(["train", *played, "--method", method] for method in METHODS),
        *(["evaluate", *played, "--method", method] for method in (*METHODS, "reference")),
        ["intervene", *played],
        ["compare", "--params", PARAMS],
    ]
    for done in forked_stages(folder, environment(), *commands):
        assert done.returncode == 0, f"{done.args}\n{done.stderr[-3000:]}"
        if done.args[0] == "rollout":
            assert re.search(r", of \d+ turns \d+ valid, \d+ disallowed, \d+ malformed, \d+ cut\. ", done.stdout)


def test_a_fresh_clone_ends_with_table_report_and_runs(runs: tuple[Path, Path]) -> None:
    reports = runs[0] / OUT / "reports"
    comparison = json.loads((reports / "comparison.json").read_text())
    assert comparison["schema"] == 3
    rows = [(row["method"], row["temperature"]) for row in comparison["rows"]]
    assert sorted(rows) == sorted((m, t) for m in (*METHODS, "reference") for t in (0.5, 1.0))
    bottleneck = json.loads((reports / "bottleneck.json").read_text())
    assert {"action", "reasoning", "response"} <= set(bottleneck)
    assert bottleneck["groups"] == 8
    assert "grpo_actfocus" in (reports / "comparison.txt").read_text()
    page = (reports / "index.html").read_text(encoding="utf-8")
    assert len(page) < 8e6
    (viewer,) = re.findall('<script type="application/json" id="viewer-data">(.*?)</script>', page)
    episodes = json.loads(viewer)["frozen_lake"]
    assert sorted(episodes) == sorted([*METHODS, "reference"])
    first = episodes["grpo_actfocus"][0]
    assert (first["seed"], first["iteration"]) == (0, 2)
    assert first["turns"][0]["board"]
    assert None not in first["turns"][0]["tokens"]["advantage"]


def test_equal_params_give_equal_bytes(runs: tuple[Path, Path]) -> None:
    one, two = map(digests, runs)
    assert len(one) > 30
    assert one == two


def test_mlflow_holds_one_run_per_training_with_a_curve_over_iterations(runs: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs[0] / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("frozen_lake")
    found = client.search_runs([experiment.experiment_id], filter_string="tags.comparison = 'smoke'")
    trainings = [run for run in found if run.data.tags["kind"] == "training"]
    [parent] = [run for run in found if run.data.tags["kind"] == "comparison"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trainings} == {parent.info.run_id}
    outs = [out for stage in read_yaml(runs[0] / OUT / "dvc.lock")["stages"].values() for out in stage["outs"]]
    md5 = {out["path"].removeprefix(f"{OUT}/"): out["md5"] for out in outs}
    made_from = {name.split("/")[-1]: md5[name] for name in ("data/annotated/frozen_lake.parquet", "models/policy")}
    assert sorted((r.data.tags["method"], r.data.tags["seed"]) for r in trainings) == sorted(
        (m, s) for m in METHODS for s in ("0", "1")
    )
    for run in trainings:
        assert run.info.status == "FINISHED"
        assert len(run.data.tags["git.revision"]) >= 40
        assert {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs} == made_from
        assert run.data.params["method.weight.kind"] in ("uniform", "actfocus")
        for metric in ("success", "gradient_share_action", "kl_reference", "tokens_per_second"):
            assert [m.step for m in client.get_metric_history(run.info.run_id, metric)] == [0, 1, 2]
    noted = json.loads((runs[0] / OUT / "data/runs/frozen_lake-grpo.json").read_text())
    assert noted["seeds"]["0"]["run_id"] in {run.info.run_id for run in trainings}
    assert noted["seeds"]["0"]["revision"] == trainings[0].data.tags["git.revision"]
    traces = client.search_traces(locations=[experiment.experiment_id])
    assert len(traces) == len(trainings)
    spans = [span.name for span in traces[0].data.spans]
    assert "turn 1" in spans
    assert client.get_model_version_by_alias("smoke-frozen_lake", "champion").run_id == parent.info.run_id


@pytest.mark.parametrize("notebook", sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_notebooks_run_on_the_outputs_and_are_committed_without_any(runs: tuple[Path, Path], notebook: str) -> None:
    folder = runs[0]
    cells = json.loads((folder / "notebooks" / notebook).read_text())["cells"]
    written = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in written)
    script = "\n".join("".join(cell["source"]) for cell in written)
    before = digests(folder)
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment(), "OUT": str(OUT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert digests(folder) == before


@pytest.fixture(scope="module")
def committed(runs: tuple[Path, Path]) -> Path:
    """The first clone with its results in Git, as ``before``, and in a remote of DVC's, a folder beside it."""
    folder = runs[0]
    call(folder, "dvc", "remote", "add", "--default", "shared", str(folder.with_name("remote")))
    commit(folder, "results")
    call(folder, "git", "tag", "before")
    call(folder, "dvc", "push", PIPELINE)
    return folder


def test_a_fresh_clone_that_pulls_has_the_results_and_nothing_to_reproduce(committed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    call(tmp_path, "git", "clone", "-q", str(committed), str(folder))
    assert digests(folder) == {}
    call(folder, "dvc", "pull", PIPELINE)
    assert digests(folder) == digests(committed)
    for told in ("timings", "runs"):
        assert files(folder / OUT / "data" / told) == files(committed / OUT / "data" / told)
    assert repro(folder) == []
    assert call(folder, "git", "status", "--porcelain").stdout == "", "not even a hash in dvc.lock is another one"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_revisions_are_compared_at_the_terminal(committed: Path) -> None:
    folder = committed
    edit(folder, lambda p: p["methods"].update(ppo=None))
    assert repro(folder) == ["compare"]

    shown = json.loads(call(folder, "dvc", "metrics", "show", "--json", f"{OUT}/reports/metrics").stdout)
    files = {name: found["data"] for name, found in shown[""]["data"].items()}
    assert set(files) == {f"{OUT}/reports/metrics/frozen_lake/{m}.json" for m in ("grpo", "grpo_actfocus", "reference")}
    changes = json.loads(call(folder, "dvc", "metrics", "diff", "before", "--json").stdout)
    success = changes[f"{OUT}/reports/metrics/frozen_lake/ppo.json"]["success"]
    assert (success["old"] is None, success["new"] is None) == (False, True)

    drawn = json.loads(call(folder, "dvc", "plots", "diff", "before", "--json", "--targets", f"{PIPELINE}::").stdout)
    assert set(drawn["data"]) == {"success", "validation_success", "entropy_action", "kl_reference"}
    points = drawn["data"]["success"][0]["content"]["data"]["values"]
    assert {(p["rev"], p["method"]) for p in points} == {
        *(("before", method) for method in METHODS),
        *(("workspace", method) for method in METHODS if method != "ppo"),
    }

    command = [sys.executable, "-m", "pipeline.commands.app", "compare", "--params", PARAMS, "--a"]
    table = call(folder, *command, "before").stdout
    rows = {line.split()[0]: line for line in table.splitlines() if line}
    assert "+0.000 [+0.000, +0.000] p_adj 1.000" in rows["grpo"]
    assert rows["grpo"].endswith("seeds × 4 states")
    assert rows["ppo"].endswith("–")
    assert "methods.ppo.advantage.kind" in rows
    wrong = subprocess.run([*command, "nothing"], cwd=folder, env=environment(), capture_output=True, text=True)
    assert (wrong.returncode, len(complaints(wrong.stderr))) == (2, 1)
    assert "A=nothing: unknown Git revision" in wrong.stderr
    unlocked = subprocess.run(
        [*command[:4], "--a", "before"], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert "A=before: reports/comparison.json: not in this revision's dvc.lock" in unlocked.stderr


def test_only_what_an_edit_touches_runs_again(runs: tuple[Path, Path]) -> None:
    folder = runs[0]
    assert repro(folder) == []

    figures = folder / "pipeline/report/comparison_figures.py"
    figures.write_text(figures.read_text() + "\n# an edit\n")
    assert repro(folder, "--dry") == ["bottleneck@frozen_lake", "compare"]

    edit(folder, lambda p: p["methods"].update(grpo_actfocus={"weight": {"reasoning_downweight": 0.3}}))
    trained = ["train@frozen_lake-grpo_actfocus", "evaluate@frozen_lake-grpo_actfocus"]
    assert sorted(repro(folder)) == sorted(["bottleneck@frozen_lake", *trained, "compare"])

    edit(folder, lambda p: p["seeds"].append(2))
    edit(folder, lambda p: p["train"].update(processes={"number": 2, "strategy": "ddp"}))  # those that are kept stay
    output = call(folder, "dvc", "repro", PIPELINE).stdout
    assert output.count("3 seeds (1 trained now, 2 kept)") == len(read_yaml(folder / PARAMS)["methods"])
    assert "stages.rollout" not in re.sub(r"Next: .*", "", output)


def test_a_killed_training_ends_in_the_bytes_of_an_uninterrupted_one(runs: tuple[Path, Path]) -> None:
    """The first repro's was not interrupted. With other settings nothing of the killed one is gone on with."""
    folder = runs[1]
    cache, straight = folder / ".cache/train", folder / ".cache/straight"
    cache.rename(straight)
    command = [sys.executable, "-m", "stages.train", "--params", PARAMS, "--environment", "frozen_lake"]
    command += ["--method", "ppo"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any("1" in log for log in begun(cache).values()) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed = begun(cache)
    assert any("1" in log for log in killed.values())
    assert not all((cache / key / "result").exists() for key in killed), "killed too late to test anything"

    rate = read_yaml(folder / PARAMS)["method_defaults"]["learning_rate"]
    edit(folder, lambda p: p.update(method_defaults={"learning_rate": 2 * rate}))
    call(folder, *command)
    others = {key: log for key, log in begun(cache).items() if key not in killed}
    assert list(others.values()) == [["0", "1", "2"]] * 2

    edit(folder, lambda p: p.pop("method_defaults"))
    call(folder, *command)
    resumed = {key: log for key, log in begun(cache).items() if key not in others}
    assert resumed.keys() >= killed.keys()
    assert len(resumed) == 2
    for key, log in resumed.items():
        assert set(log) == {"0", "1", "2"}
        assert len(log) <= 4, "more than one iteration was computed twice"
        assert left(cache / key / "result") == left(straight / key / "result")


def begun(cache: Path) -> dict[str, list[str]]:
    """Iterations that each training has begun, in order, by its key."""
    return {log.parent.name: log.read_text().split() for log in cache.glob("*/begun.log")}
