"""One trial: a training per seed, validated at the same iterations and stopped or kept together, and how it is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from optuna.exceptions import TrialPruned
from optuna.trial import Trial

from pipeline.settings.sweep import Constraints, Value
from pipeline.settings.train import Train
from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.space import suggest
from pipeline.training.alarms import alarm_text
from pipeline.training.budget import progress
from pipeline.training.checkpoints import drop
from pipeline.training.run import Curve, TrainingJob, train_until
from pipeline.training.seed_key import training_task
from pipeline.workspace.files import lock
from pipeline.workspace.finite import NotFiniteError
from pipeline.workspace.layout import Cache
from pipeline.workspace.processes import Tell

SeedCurves = Mapping[int, Sequence[Mapping[str, float]]]
"""Seed -> one row of metrics per iteration."""


@dataclass(frozen=True)
class Outcome:
    """What a finished trial has to show."""

    values: tuple[float, ...]
    """Success, then tokens per episode if fewer of them are wanted."""
    violations: dict[str, float]
    """By how much each constraint is broken."""
    curves: SeedCurves


Objective = Callable[[Trial, dict[str, Value], Tell], Outcome]
"""Runs a trial at a point of the space; raises ``TrialPruned`` if it is to be stopped early."""


@dataclass(frozen=True)
class TrainingObjective:
    """Trains the plan's method at a point of the space."""

    plan: SearchPlan

    def __call__(self, trial: Trial, values: dict[str, Value], report: Tell) -> Outcome:
        plan, sweep = self.plan, self.plan.config.sweep
        config = plan.configured(values)
        seeds = sweep.seeds
        tasks = [
            training_task(config, plan.environment, plan.method, seed, plan.policy, Cache().sweep) for seed in seeds
        ]
        curves: dict[int, Curve] = {seed: [] for seed in seeds}
        iterations, every = config.train.iterations, config.train.validate_every
        stops = () if sweep.pruner.kind == "none" else range(every, iterations, every)
        for rung in [*stops, iterations]:
            for task in tasks:
                others = [curve for seed, curve in curves.items() if seed != task.seed]
                shifted = _shifted(report, others, config.train)
                try:
                    curves[task.seed] = train_until(TrainingJob(task, None, None, keeps_policy=False), rung, shifted)
                except NotFiniteError as error:  # settings under which a training diverges are no worse than bad ones
                    raise TrialPruned(str(error)) from None
            if not sweep.fewer_tokens:  # Optuna takes no intermediate values of two objectives
                trial.report(success(curves, sweep.score), max(map(len, curves.values())))
            if rung < iterations and trial.should_prune():
                for task in tasks:
                    with lock(task.cache / "lock"):  # another trial may have the same settings
                        drop(task.cache)
                raise TrialPruned(f"stopped after {rung} iterations")
        values_found = (success(curves, sweep.score), *((tokens(curves),) if sweep.fewer_tokens else ()))
        return Outcome(values_found, violations(curves, sweep.constraints), curves)


def _shifted(report: Tell, others: Sequence[Curve], train: Train) -> Tell:
    """Reports of one seed as those of all seeds."""
    before = sum(progress(curve, train)[0] for curve in others)
    return lambda done, total, text="": report(before + done, total * (1 + len(others)), text)


def run_trial(trial: Trial, plan: SearchPlan, objective: Objective, report: Tell) -> Outcome:
    """Draw a trial's settings and run it; constraints are set on the trial, and what its seeds have alarmed of.

    Raises:
        TrialPruned: it was stopped early.
    """
    values = suggest(trial, plan.search.space)
    trial.set_user_attr("values", values)
    outcome = objective(trial, values, report)
    if alarmed := {str(seed): text for seed, curve in outcome.curves.items() if (text := alarm_text(curve))}:
        trial.set_user_attr("alarms", alarmed)
    for name, excess in outcome.violations.items():
        trial.set_constraint(name, excess)
    return outcome


def validation(curve: Sequence[Mapping[str, float]]) -> list[tuple[int, float]]:
    """(iterations done, validation success) of every validation so far, the one before training first."""
    before = [(0, row["validation_success_before"]) for row in curve if "validation_success_before" in row]
    return before + [
        (int(row["iteration"]) + 1, row["validation_success"]) for row in curve if "validation_success" in row
    ]


def success(curves: SeedCurves, score: Literal["final", "area"]) -> float:
    """Mean over seeds of validation success, in [0, 1]. A sweep has too few seeds to leave any out.

    Args:
        curves: of all seeds, to the same iteration, which ends with a validation.
        score: ``final`` takes the last validation, ``area`` the mean over training (trapezoids between validations).
    """
    return float(np.mean([validation(c)[-1][1] if score == "final" else _area(c) for c in curves.values()]))


def tokens(curves: SeedCurves) -> float:
    """Sampled tokens per episode of the last iteration, mean over seeds."""
    return float(np.mean([curve[-1]["tokens_per_episode"] for curve in curves.values()]))


def violations(curves: SeedCurves, constraints: Constraints) -> dict[str, float]:
    """By how much each constraint that is not null is broken, at the ends of curves; zero or less where it is kept."""
    found = {}
    if constraints.kl is not None:
        found["kl"] = float(np.mean([curve[-1]["kl_reference"] for curve in curves.values()])) - constraints.kl
    if constraints.loss is not None:
        lost = [validation(curve)[0][1] - validation(curve)[-1][1] for curve in curves.values()]
        found["loss"] = max(lost) - constraints.loss
    return found


def _area(curve: Sequence[Mapping[str, float]]) -> float:
    at, values = zip(*validation(curve), strict=True)
    return float(np.trapezoid(values, at) / (at[-1] - at[0]))
