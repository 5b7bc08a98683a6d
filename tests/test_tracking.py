"""Runs in an embedded store: what they carry, how they are nested, and that nothing is logged twice."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from filelock import Timeout
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from pipeline.settings.params import Config, load
from pipeline.tracking.comparison import best_training, log_comparison
from pipeline.tracking.datasets import dvc_digest
from pipeline.tracking.parents import log_parent, log_trial
from pipeline.tracking.send import send_waiting
from pipeline.tracking.spool import Spool, waiting
from pipeline.tracking.store import study_run
from pipeline.tracking.training import Store, TrainingRun
from pipeline.training.run import TrainingJob, train_until
from pipeline.workspace.files import write_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.yaml_files import read_yaml
from tests.tracked import Training, apart, runs_of, steps, toy_job, toy_settings
from tests.trainings import LAKE, configured, quiet

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("tracking")


@pytest.fixture
def root(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root with a store of its own; artifacts go beside it."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def store(root: Path) -> Store:
    return Store(f"sqlite:///{root / 'mlflow.db'}", root / ".cache")


# ------------------------------------------------------------------------------------------------------------ the spool


def test_a_spool_gives_back_what_was_added_and_forgets_a_line_that_was_cut_off(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    assert not spool.waiting
    spool.append({"kind": "run", "name": "ä"}, {"kind": "end"})
    with (tmp_path / "run" / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "met')
    assert [record["kind"] for record in spool.records] == ["run", "end"]
    spool.mark(spool.read()[-1][0], "id")
    assert not spool.waiting
    spool.append({"kind": "tags"})
    assert [record["kind"] for record in spool.records] == ["run", "end", "tags"]
    assert [record["kind"] for _, record in spool.read(spool.sent.offset)] == ["tags"]
    assert spool.waiting


def test_only_one_process_sends_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    with spool.locked(), pytest.raises(Timeout), Spool(tmp_path / "run").locked(wait=False):
        pass
    with spool.locked(wait=False):
        pass


def test_a_digest_is_the_one_by_which_dvc_knows_a_folder(tmp_path: Path) -> None:
    (tmp_path / "policy" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "a-b.txt"):
        (tmp_path / "policy" / name).write_text(name)
    dvc = [str(Path(sys.executable).parent / "dvc")]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*dvc, "add", "-q", "policy"], cwd=tmp_path, check=True)
    known = read_yaml(tmp_path / "policy.dvc")["outs"][0]["md5"]
    assert dvc_digest(tmp_path / "policy") == known
    assert dvc_digest(tmp_path / "policy" / "a.txt") == hashlib.md5(b"a.txt").hexdigest()


# ------------------------------------------------------------------------------------------------- trainings and parent


def test_trainings_at_once_are_nested_in_one_comparison(directory: Path, store: Store, root: Path) -> None:
    config = configured({"tracking": {"traces": 1}})
    jobs = [toy_job(config, directory, store, seed, method) for seed in (0, 1) for method in ("grpo", "ppo")]
    for training in [Training(job, root / "log") for job in jobs]:
        training.join()
    [parent] = runs_of(store.uri, "comparison")
    found = runs_of(store.uri, "training")
    assert sorted((run.data.tags["method"], run.data.tags["seed"]) for run in found) == [
        ("grpo", "0"),
        ("grpo", "1"),
        ("ppo", "0"),
        ("ppo", "1"),
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in found} == {parent.info.run_id}
    assert "warning: tracking" not in (root / "log").read_text()
    run = found[0]
    client = MlflowClient(store.uri)
    file = client.download_artifacts(run.info.run_id, "params.yaml", str(root))
    assert load(file) == config
    assert store.uri not in Path(file).read_text()
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "episodes.json", str(root))).read_text())
    assert len(table["data"]) == 8
    assert "<answer>" in table["data"][0][table["columns"].index("dialogue")]
    assert run.inputs.dataset_inputs[0].dataset.digest == dvc_digest(directory)


def test_an_iteration_that_is_computed_again_is_not_logged_again(directory: Path, store: Store, root: Path) -> None:
    settings = toy_settings(configured(), directory, store)[0]
    TrainingRun(settings, root / "training").log({"success": 0.25}, 0)
    resumed = TrainingRun(settings, root / "training")
    resumed.log({"success": 0.25}, 0)
    resumed.log({"success": 0.5}, 1)
    run_id = resumed.finish(None, None)["run_id"]
    assert run_id is not None
    assert steps(store.uri, run_id, "success") == [0, 1]
    ended = MlflowClient(store.uri).get_run(run_id).info.end_time
    # Killed between the end of its run and the appearance of its result.
    assert TrainingRun(settings, root / "training").finish(None, None)["run_id"] == run_id
    assert MlflowClient(store.uri).get_run(run_id).info.end_time == ended


def test_a_training_that_was_killed_after_its_last_iteration_has_its_episodes(
    directory: Path, store: Store, root: Path
) -> None:
    job = toy_job(configured({"tracking": {"traces": 1}}), directory, store)
    child = multiprocessing.get_context("fork").Process(target=killed_before_the_end, args=(job,))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert not job.task.finished
    apart(train_until, job, 2, quiet)
    [run] = runs_of(store.uri, "training")
    assert run.info.status == "FINISHED"
    assert len(MlflowClient(store.uri).search_traces(locations=[run.info.experiment_id])) == 1


def killed_before_the_end(job: TrainingJob) -> None:
    """Train all iterations, and be killed before the run is told so."""
    TrainingRun.finish = lambda *_: os._exit(9)  # type: ignore[method-assign]
    train_until(job, 2, quiet)


# ------------------------------------------------------------------------------------------- the comparison, as a whole


def comparison_of(config: Config, success: float) -> dict[str, Any]:
    row = {
        "environment": LAKE,
        "method": "grpo",
        "temperature": 0.5,
        "success_mean": success,
        "difference_to_reference": 0.125,
        "difference_to_uniform": None,
        "difference_to_control": None,
    }
    return {"rows": [row, {**row, "temperature": 1.0, "success_mean": 0.5}]}


def test_a_comparison_has_one_run_that_is_brought_up_to_date(directory: Path, store: Store, root: Path) -> None:
    config = configured(
        {
            "methods": {
                "ppo": None,
                "ppo_actfocus": None,
                "ppo_matched": None,
                "grpo_actfocus": None,
                "grpo_matched": None,
            },
            "compare": {"uniform": {"ppo_actfocus": None, "grpo_actfocus": None}, "control": None},
            "seeds": [0, 1],
        }
    )
    curves = {(LAKE, "grpo"): {str(seed): [{"validation_success": 0.25 * seed}] for seed in (0, 1)}}
    (root / "reports" / "figures").mkdir(parents=True)
    for name in ("comparison.json", "index.html", f"figures/{LAKE}-success.svg", "figures/sokoban-success.svg"):
        (root / "reports" / name).write_text(name)
    write_json(
        root / "data" / "runs" / f"{LAKE}-grpo.json",
        {
            "seeds": {
                "0": {"run_id": "r0", "tracking_id": "t0", "comparison": config.comparison},
                "1": {"run_id": None, "tracking_id": "t1", "comparison": "controls"},
            }
        },
    )
    sample = {LAKE: {"grpo": [{"id": "e", "state": "s", "return": 1.0, "success": True, "end": "goal", "turns": []}]}}
    for success in (0.25, 0.25, 0.75):
        log_comparison(config, root, comparison_of(config, success), curves, sample, Layout(root))

    [run] = runs_of(store.uri, "comparison")
    client, run_id = MlflowClient(store.uri), run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["success_mean/grpo/0.5"] == 0.75
    history = client.get_metric_history(run_id, "success_mean/grpo/0.5")
    assert [point.value for point in history] == [0.25, 0.75]
    assert len(client.get_metric_history(run_id, "success_mean/grpo/1")) == 1
    assert {file.path for file in client.list_artifacts(run_id)} == {
        "comparison.json", "index.html", "figures", "params.yaml", "trainings.json", "episodes.json",
    }  # fmt: skip
    assert [file.path for file in client.list_artifacts(run_id, "figures")] == [f"figures/{LAKE}-success.svg"]
    trainings = json.loads(Path(client.download_artifacts(run_id, "trainings.json", str(root))).read_text())
    assert [one["tracking_id"] for one in trainings] == ["t0", "t1"]
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("training.")}
    assert tags == {"training.grpo.seed-1": "t1 in controls"}
    assert client.search_registered_models() == []  # no policy is there

    # A store that is new by now is sent the whole of it, though nothing has changed.
    client.delete_run(run_id)
    log_comparison(config, root, comparison_of(config, 0.75), curves, sample, Layout(root))
    [again] = runs_of(store.uri, "comparison")
    assert again.info.run_id != run_id
    assert again.data.metrics == run.data.metrics


def test_the_champion_is_chosen_by_validation_at_the_end() -> None:
    def rows(*validation: float | None) -> list[dict[str, float]]:
        return [{"success": 1.0} if value is None else {"validation_success": value} for value in validation]

    curves = {"a": {"0": rows(0.9, 0.2), "1": rows(0.1, 0.4)}, "b": {"0": rows(0.0, 0.4), "1": rows(0.0, 0.3)}}
    assert best_training(curves) == ("a", "1", 0.4)
    assert best_training({"a": {"0": rows(0.9, None)}}) is None


def test_the_champion_loads_as_a_pipeline_and_as_a_hugging_face_directory(
    directory: Path, store: Store, root: Path
) -> None:
    config = configured({"seeds": [0]})
    trained = root / "models" / "trained" / f"{LAKE}-grpo" / "seed-0"
    shutil.copytree(directory, trained)
    curves = {(LAKE, method): {"0": [{"validation_success": float(method == "grpo")}]} for method in config.methods}

    def compare() -> Any:
        log_comparison(config, root, {"rows": []}, curves, {}, Layout(root))
        assert waiting(store.cache) == []
        client = MlflowClient(store.uri)
        return client.get_model_version_by_alias(f"{config.comparison}-{LAKE}", "champion")

    first = compare()
    assert compare().version == first.version == 1
    assert {key: first.tags[key] for key in ("method", "seed", "validation_success")} == {
        "method": "grpo",
        "seed": "0",
        "validation_success": "1",
    }
    [run] = runs_of(store.uri, "comparison")
    assert run.info.status == "FINISHED"
    assert first.run_id == run.info.run_id

    mlflow.set_tracking_uri(store.uri)
    name = f"models:/{config.comparison}-{LAKE}@champion"
    pipeline = mlflow.transformers.load_model(name)
    written = pipeline("<|user|>", max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    assert isinstance(written, str)
    own = AutoModelForCausalLM.from_pretrained(trained)
    files = Path(mlflow.artifacts.download_artifacts(name, dst_path=str(root / "downloaded")))
    assert not list(files.rglob("*.bin"))
    for model in (pipeline.model, AutoModelForCausalLM.from_pretrained(files / "model")):
        loaded = model.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in own.state_dict().items())

    config_file = trained / "generation_config.json"
    config_file.write_text(config_file.read_text() + "\n")
    assert compare().version == 2


# ------------------------------------------------------------------------------------------------------------- a sweep


def test_trials_are_nested_in_their_study_whatever_became_of_them(store: Store, root: Path) -> None:
    study = study_run(configured(), root, LAKE, "actfocus-grpo")
    rows = [{"iteration": i, "validation_success": i / 10} for i in range(3)]
    for _ in range(2):  # a resumed sweep
        log_trial(study, 0, "COMPLETE", {"method": {"learning_rate": 1e-4}}, rows, {"baseline": "paper"})
        log_trial(study, 1, "PRUNED", {"method": {"learning_rate": 1e-3}}, rows[:1], {})
        log_trial(study, 2, "FAIL", {}, [], {"retry_of": "1"})
        log_parent(study, {"best": 0.2})
    [parent] = runs_of(store.uri, "study")
    trials = runs_of(store.uri, "trial")
    assert [run.data.tags["trial"] for run in trials] == ["0", "1", "2"]
    assert [run.data.tags["state"] for run in trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert [run.info.status for run in trials] == ["FINISHED", "KILLED", "FAILED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert trials[0].data.params == {"method.learning_rate": "0.0001"}
    assert trials[0].data.tags["baseline"] == "paper"
    assert steps(store.uri, trials[0].info.run_id, "validation_success") == [0, 1, 2]
    assert parent.data.metrics == {"best": 0.2}
    assert parent.info.status == "FINISHED"


def test_trials_of_a_sweep_without_a_server_are_sent_later(
    store: Store, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = study_run(configured(), root, LAKE, "actfocus")
    nowhere = replace(study, store=replace(study.store, uri="http://127.0.0.1:9"))
    for number in range(3):
        log_trial(nowhere, number, "COMPLETE", {}, [{"iteration": 0, "validation_success": 0.5}], {})
    log_parent(nowhere, {"best": 0.5})
    assert capfd.readouterr().err.count("cannot be used now") == 1
    assert apart(send_waiting, store.uri, store.cache) == (4, 0)
    assert len(runs_of(store.uri, "trial")) == 3
    assert len(runs_of(store.uri, "study")) == 1


def test_a_run_that_the_store_refuses_does_not_hold_up_others(
    directory: Path, store: Store, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = toy_settings(configured(), directory, store)[0]
    bad = TrainingRun(settings, store.cache / "train" / "a")
    for iteration in range(3):
        bad.log({"not a metric's name: \x1b[2J?": 1.0}, iteration)
    nowhere = replace(settings, store=Store("http://user:secret@127.0.0.1:9", store.cache))
    TrainingRun(nowhere, store.cache / "train" / "b").log({"success": 1.0}, 0)
    capfd.readouterr()
    assert send_waiting(store.uri, store.cache) == (1, 1)
    told = capfd.readouterr().err
    assert told.count("cannot be used now") == 1
    assert "train/a" in told
    assert "\x1b" not in told
    assert "success" in runs_of(store.uri, "training")[-1].data.metrics
    # Of a store that is away, the password is not told either.
    assert send_waiting("http://user:secret@127.0.0.1:9", store.cache) == (0, 1)
    assert "secret" not in capfd.readouterr().err


def test_what_writes_records_does_not_wait_for_mlflow_to_be_imported() -> None:
    """A sweep's trainings have no run; MLflow takes two seconds."""
    code = "import sys, pipeline.tracking.parents; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
