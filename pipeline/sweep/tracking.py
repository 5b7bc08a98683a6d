"""A sweep in MLflow: a run per study, and nested in it a run per trial with its state, settings and mean curve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.result import SearchResult, settings, summary
from pipeline.sweep.trial import Outcome, SeedCurves
from pipeline.sweep.workers import Observer
from pipeline.tracking.parents import log_parent, log_trial
from pipeline.tracking.store import study_run


def observer(plan: SearchPlan, root: Path) -> Observer:
    """Logs every trial as it ends; to be called after the store has been opened (``open_store``)."""
    run = study_run(plan.config, root, plan.environment, plan.name)

    def observe(trial: FrozenTrial, outcome: Outcome | None) -> None:
        rows = _scores(trial) if outcome is None else mean_curve(outcome.curves)
        began = trial.datetime_start
        started = None if began is None else int(began.timestamp() * 1000)
        state: Any = trial.state.name
        log_trial(run, trial.number, state, settings(trial), rows, _tags(plan, trial), started)

    return observe


def log_search(found: SearchResult, root: Path, folder: Path) -> None:
    """Bring a search's run up to date: trials of killed workers, which nobody saw end, the outcome and the figures."""
    plan = found.plan
    observe = observer(plan, root)
    for trial in found.trials:
        if trial.state.is_finished():
            observe(trial, None)
    outcome = summary(found)
    points = {**outcome["baselines"], "best": outcome["best"]}
    metrics = {f"score_{name}": point["score"] for name, point in points.items() if point is not None}
    metrics |= {f"trials_{state.lower()}": count for state, count in outcome["trials"].items()}
    shown = [*sorted(folder.glob(f"{plan.method}-*.png")), folder / "trials.csv", folder / "best.yaml"]
    run = study_run(plan.config, root, plan.environment, plan.name)
    log_parent(run, metrics, files=[("sweep", file) for file in shown])


def mean_curve(curves: SeedCurves) -> list[dict[str, float]]:
    """Mean over seeds of every metric, a row per iteration that all seeds have reached."""
    return [
        {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if all(key in row for row in rows)}
        for rows in zip(*curves.values(), strict=False)
    ]


def _scores(trial: FrozenTrial) -> list[dict[str, float]]:
    """What is known of a trial whose curves are not: its scores at the iterations at which it could have been stopped."""
    return [{"iteration": step - 1, "score": value} for step, value in sorted(trial.intermediate_values.items())]


def _tags(plan: SearchPlan, trial: FrozenTrial) -> Mapping[str, str]:
    shown = ("slot", "baseline", "retry_of", "failure")
    score = {} if trial.values is None else {"score": f"{trial.values[0]:.4f}"}
    return {"method": plan.method, **score, **{k: str(v) for k, v in trial.user_attrs.items() if k in shown}}
