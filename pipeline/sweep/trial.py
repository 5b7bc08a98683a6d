"""One trial: a training per seed, validated at the same iterations and stopped or kept together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optuna.exceptions import TrialPruned
from optuna.trial import Trial

from pipeline.processes import Report
from pipeline.studies import Value
from pipeline.sweep.plan import Plan
from pipeline.sweep.score import Curves, success, tokens, violations
from pipeline.sweep.space import suggest
from pipeline.training.result import training_task
from pipeline.training.run import TrainingJob, train_until

CACHE = Path(".cache/sweep")
"""Trials' trainings by key, so that one whose worker was killed goes on where it stopped; beside them the journal."""


@dataclass(frozen=True)
class Outcome:
    """What a finished trial has to show."""

    values: tuple[float, ...]
    """Success, then tokens per episode if fewer of them are wanted."""
    violations: dict[str, float]
    """By how much each constraint is broken."""
    curves: Curves


Objective = Callable[[Trial, dict[str, Value], Report], Outcome]
"""Runs a trial at a point of the space; raises ``TrialPruned`` if it is to be stopped early."""


@dataclass(frozen=True)
class TrainingObjective:
    """Trains the plan's method at a point of the space."""

    plan: Plan

    def __call__(self, trial: Trial, values: dict[str, Value], report: Report) -> Outcome:
        plan, sweep = self.plan, self.plan.config.sweep
        config = plan.configured(values)
        seeds = sweep.seeds
        tasks = [training_task(config, plan.environment, plan.method, seed, plan.policy, CACHE) for seed in seeds]
        total = config.train.iterations * len(tasks)
        curves: Curves = {}
        for rung in self._rungs(config.train.iterations, config.train.validate_every):
            found = {}
            for place, task in enumerate(tasks):
                # Seeds later in the row are still at the rung before.
                others = sum(len(curves.get(seed, ())) for seed in seeds[place + 1 :]) + rung * place

                found[task.seed] = train_until(TrainingJob(task, None, None), rung, _shifted(report, others, total))
            curves = found
            if not sweep.fewer_tokens:  # Optuna takes no intermediate values of two objectives
                trial.report(success(curves, sweep.score), rung)
            if rung < config.train.iterations and trial.should_prune():
                for task in tasks:
                    (task.cache / "checkpoint.ckpt").unlink(missing_ok=True)
                raise TrialPruned(f"stopped after {rung} iterations")
        for task in tasks:  # a sweep leaves settings and curves, not policies
            shutil.rmtree(task.result / "policy", ignore_errors=True)
        values_found = (success(curves, sweep.score), *((tokens(curves),) if sweep.fewer_tokens else ()))
        return Outcome(values_found, violations(curves, sweep.constraints), curves)

    def _rungs(self, iterations: int, every: int) -> list[int]:
        """Iterations after which a trial may be stopped, and its last."""
        if self.plan.config.sweep.pruner.kind == "none":
            return [iterations]
        return [*range(every, iterations, every), iterations]


def _shifted(report: Report, others: int, total: int) -> Report:
    return lambda done, _, text="": report(others + done, total, text)


def run_trial(trial: Trial, plan: Plan, objective: Objective, report: Report) -> Outcome:
    """Draw a trial's settings and run it; constraints are set on the trial.

    Raises:
        TrialPruned: it was stopped early.
    """
    values = suggest(trial, plan.search.space)
    trial.set_user_attr("values", values)
    outcome = objective(trial, values, report)
    for name, excess in outcome.violations.items():
        trial.set_constraint(name, excess)
    return outcome
