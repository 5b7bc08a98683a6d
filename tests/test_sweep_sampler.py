"""Draws are named by the study's seed and the trial's number, and depend on what has been seen, nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import Trial

from pipeline.sweep.trial import Outcome
from pipeline.sweep.workers import Search, run_search
from pipeline.workspace.processes import Tell
from tests.searches import ALPHA, BETA, TAU, searches


def hill(trial: Trial, values: dict[str, Any], report: Tell) -> Outcome:
    """Highest at (0.1, 0.5, 1)."""
    success = 1.0 - (values[ALPHA] - 0.1) ** 2 - (values[BETA] - 0.5) ** 2 - math.log10(values[TAU]) ** 2
    return Outcome((success,), {"kl": values[ALPHA] - 0.5}, {})


def draws(folder: Path, monkeypatch: pytest.MonkeyPatch, *trials: int, seed: int = 0) -> list[dict[str, float]]:
    """Points tried by one worker that is asked for more and more trials."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    for count in trials:
        plan = searches(folder, trials=count, seed=seed, startup_trials=6, pruner={"kind": "none"})[0]
        found = run_search(Search(plan, hill), 1)
    return [trial.params for trial in found]


def test_a_search_of_one_worker_is_repeated_exactly_also_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draws(tmp_path / "whole", monkeypatch, 14)
    assert draws(tmp_path / "again", monkeypatch, 14) == whole
    assert draws(tmp_path / "parts", monkeypatch, 4, 9, 14) == whole
    assert len({tuple(point.values()) for point in whole}) == 14


def test_the_settings_of_a_trial_are_drawn_apart_and_so_are_those_of_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searches(tmp_path / "plan")[0]
    first, second = (draws(tmp_path / str(seed), monkeypatch, 6, seed=seed) for seed in (0, 1))
    assert first[:2] == second[:2] == list(plan.draws().values())
    assert all(one[key] != other[key] for one, other in zip(first[2:], second[2:], strict=True) for key in one)
    for point in first[2:]:
        uniform = [point[ALPHA], point[BETA] / 2.0, math.log10(point[TAU] / 0.1) / 2.0]
        assert np.ptp(uniform) > 1e-6
        assert min(abs(a - b) for i, a in enumerate(uniform) for b in uniform[:i]) > 1e-6
