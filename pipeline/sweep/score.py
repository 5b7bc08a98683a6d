"""What a trial is judged by, from the learning curves of its seeds."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pipeline.settings.sweep import Constraints

SeedCurves = Mapping[int, Sequence[Mapping[str, float]]]
"""Seed -> one row of metrics per iteration."""


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
    """By how much each constraint is broken; zero or less where it is kept.

    Args:
        curves: of all seeds, to their ends.
        constraints: those that are null are left out.
    """
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
