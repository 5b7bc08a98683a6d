"""A sweep seen from outside: its runs in MLflow, and its section in the report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from optuna.exceptions import TrialPruned
from optuna.trial import Trial

from pipeline.report.sweep import read_sweeps
from pipeline.settings.sweep import Value
from pipeline.sweep.figures import write_figures
from pipeline.sweep.result import Found, best_overlay, summary, trials_table
from pipeline.sweep.tracking import log_search, mean_curve, observer
from pipeline.sweep.trial import Outcome
from pipeline.sweep.workers import Search, run_search
from pipeline.tracking.store import open_store, store_of
from pipeline.workspace.files import write_json, write_text
from pipeline.workspace.layout import Layout
from pipeline.workspace.processes import Tell, in_own_process
from tests.searches import ALPHA, searches

TRIALS = 7


def objective(trial: Trial, values: dict[str, Value], report: Tell) -> Outcome:
    """The third trial is stopped early, and the fourth kills its worker the first time."""
    if trial.number == 2:
        trial.report(0.1, 10)
        raise TrialPruned
    if trial.number == 3:
        os._exit(9)
    score = 0.5 - abs(float(values[ALPHA]) - 0.1) / 2  # type: ignore[arg-type]
    curve = [{"iteration": float(i), "success": score * (i + 1) / 3, "kl_reference": 0.01} for i in range(3)]
    lower = [{**row, "success": row["success"] / 2} for row in curve]
    return Outcome((score,), {"kl": -0.4}, {100: curve, 101: lower})


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    monkeypatch.chdir(tmp_path)
    [plan] = searches(tmp_path, "actfocus", {"tracking": {"uri": f"sqlite:///{tmp_path / 'runs.db'}"}}, trials=TRIALS)
    in_own_process(open_store, store_of(plan.config, tmp_path), plan.environment)
    trials = run_search(Search(plan, objective, observer(plan, tmp_path)), 2)
    return Found(plan, trials)


def test_every_trial_has_a_run_below_the_studys_whatever_became_of_it_and_the_report_shows_the_sweep(
    found: Found, tmp_path: Path
) -> None:
    folder, plan = tmp_path / "reports" / "sweep" / "actfocus", found.plan
    write_text(folder / "trials.csv", trials_table([found]).to_csv(index=False))
    write_text(folder / "best.yaml", best_overlay([found]))
    write_json(folder / "summary.json", {"schema": 1, "study": "actfocus", "searches": [summary(found)]})
    write_figures([found], folder)
    for _ in range(2):  # twice: nothing is there twice
        in_own_process(log_search, found, tmp_path, folder)

    client = MlflowClient(store_of(plan.config, tmp_path).uri)
    experiment = client.get_experiment_by_name(plan.environment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [study] = [run for run in runs if run.data.tags["kind"] == "study"]
    below = {run.data.tags["trial"]: run for run in runs if run.data.tags["kind"] == "trial"}
    assert len(runs) == 1 + len(below) == 1 + TRIALS + 1  # one was killed and tried again
    assert {run.data.tags["mlflow.parentRunId"] for run in below.values()} == {study.info.run_id}
    states = {number: (run.data.tags["state"], run.info.status) for number, run in below.items()}
    assert (states.pop("2"), states.pop("3")) == (("PRUNED", "KILLED"), ("FAIL", "FAILED"))
    assert set(states.values()) == {("COMPLETE", "FINISHED")}
    assert below["3"].data.tags["failure"] == "its worker was killed"
    assert [run.data.tags.get("retry_of") for run in below.values()].count("3") == 1
    assert (below["0"].data.tags["baseline"], below["1"].data.tags["baseline"]) == ("uniform", "paper")
    assert float(below["1"].data.params[ALPHA]) == 0.1

    history = client.get_metric_history(below["1"].info.run_id, "success")
    assert [(m.step, m.value) for m in history] == [(i, pytest.approx(0.5 * (i + 1) / 3 * 0.75)) for i in range(3)]
    assert study.data.metrics["score_paper"] == 0.5
    assert study.data.metrics["trials_complete"] == TRIALS - 1
    files = {file.path for file in client.list_artifacts(study.info.run_id, "sweep")}
    assert {"sweep/trials.csv", "sweep/best.yaml", "sweep/grpo_actfocus-history.png"} <= files

    [section] = read_sweeps(Layout(tmp_path))
    assert section["name"] == "actfocus"
    assert f"{TRIALS - 1} complete, 1 fail, 1 pruned" in section["summary"]
    assert "paper  " not in section["summary"]
    best = summary(found)["best"]
    assert [row[:3] for row in section["table"]["rows"]] == [
        ["grpo_actfocus", "paper", "0.500"],
        ["grpo_actfocus", "uniform", "0.050"],
        ["grpo_actfocus", "best", f"{best['score']:.3f}"],
    ]
    assert section["verdict"] == []
    assert len(section["figures"]) == 8
    parallel = next(f["plotly"]["layout"] for f in section["figures"] if "parallel" in f["title"])
    alphas = [a["text"] for a in parallel["annotations"] if a["x"] == 1]
    assert alphas[-1] == "1"
    assert float(alphas[-2]) < 0.75  # halfway and more along its axis: values, not draws
    assert parallel["xaxis"]["ticktext"][1] == "reasoning_downweight"
    verdict = tmp_path / "sweeps" / "confirm_actfocus" / "reports" / "verdict.txt"
    write_text(verdict, "best is not told apart\nfrom anything\n")
    assert read_sweeps(Layout(tmp_path))[0]["verdict"] == ["best is not told apart", "from anything"]


def test_without_a_sweep_the_report_has_no_section(tmp_path: Path) -> None:
    assert read_sweeps(Layout(tmp_path)) == []


def test_a_mean_curve_ends_with_the_shortest_seed_and_has_what_all_seeds_have() -> None:
    curves = {0: [{"iteration": 0, "a": 1.0, "b": 2.0}, {"iteration": 1, "a": 3.0}], 1: [{"iteration": 0, "a": 2.0}]}
    assert mean_curve(curves) == [{"iteration": 0.0, "a": 1.5}]
