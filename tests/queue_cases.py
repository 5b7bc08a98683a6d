"""A toy objective and its storages, for tests of searches."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import TrialPruned
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.trial import Outcome
from pipeline.workspace.processes import Tell
from tests.searches import (
    ALPHA,
    BETA,
    awaited,
    new_database,
    searches,
    trials_asked_for,
    written,
)

TRIALS = 12


@dataclass(frozen=True)
class Toy:
    """Success is highest at (0.1, 0.5), reported twice; whatever begins and ends is written into a log."""

    log: Path
    pause: float = 0.02

    def __call__(self, trial: Trial, values: dict[str, Any], report: Tell) -> Outcome:
        self.note("begins", trial)
        success = 1.0 - (values[ALPHA] - 0.1) ** 2 - (values[BETA] - 0.5) ** 2
        for iteration in (10, 20):
            self.work(trial, values)
            report(iteration, 20)
            trial.report(success, iteration)
            if trial.should_prune():
                self.note("ends", trial)
                raise TrialPruned
        self.note("ends", trial)
        return Outcome((success,), {"kl": -0.1}, {})

    def work(self, trial: Trial, values: dict[str, Any]) -> None:
        time.sleep(self.pause)

    def note(self, what: str, trial: Trial) -> None:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{what} {trial.number} {os.getpid()}\n")


def database(request: pytest.FixtureRequest) -> str:
    return new_database(request.getfixturevalue("server"))


def toy_plan(folder: Path, storage: str | None = None, **sweep: Any) -> SearchPlan:
    quick = {"trials": TRIALS, "startup_trials": 6, "heartbeat": 0.1, "storage": storage}
    pruner = {"kind": "median", "after_trials": 4, "after_iterations": 10}
    return searches(folder, "actfocus", **{**quick, "pruner": pruner, **sweep})[0]


def ended(log: Path) -> list[list[str]]:
    return [line for line in written(log) if line[0] == "ends"]


def check(plan: SearchPlan, log: Path) -> list[FrozenTrial]:
    """What holds at the end, whatever happened: exactly the trials asked for, nothing lost, run or drawn twice."""
    trials = trials_asked_for(plan)
    begun = Counter(int(number) for what, number, _ in written(log) if what == "begins")
    assert set(begun.values()) == {1}, "a trial was run twice"
    assert {t.number for t in trials if t.state != TrialState.FAIL} <= set(begun)
    assert Counter(int(line[1]) for line in ended(log)) <= begun
    return trials


def latest_begun(log: Path) -> list[str]:
    """Number and worker of a trial that has begun and not ended."""
    return awaited(
        lambda: next(
            (
                line[1:]
                for line in reversed(written(log))
                if line[0] == "begins" and not any(other[1] == line[1] and other[0] == "ends" for other in written(log))
            ),
            None,
        )
    )
