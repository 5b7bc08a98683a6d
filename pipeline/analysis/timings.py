"""Where the time of a training goes, and how much of a rollout is the environment's."""

from collections.abc import Mapping

import numpy as np

from pipeline.analysis.curves import Curves

PREFIX = "seconds_"
"""Opens the name of a phase in timings; ``seconds`` alone is cumulative wall-clock."""


def phase_seconds(curves: Curves) -> dict[str, float]:
    """Mean seconds of an iteration by phase, over seeds and all iterations but the first.

    The first iteration's episodes come from the rollout stage, so that it has no rollout of its own.
    """
    rows = [row for seed in curves.values() for row in seed[1:]]
    phases = sorted({key for row in rows for key in row if key.startswith(PREFIX)})
    return {phase.removeprefix(PREFIX): float(np.mean([row.get(phase, 0.0) for row in rows])) for phase in phases}


def environment_shares(curves: Curves) -> dict[str, float]:
    """Shares, in [0, 1], of the time of rollouts: ``reset`` (drawing states and starting episodes) and ``step``.

    NaN if no iteration has sampled anything.
    """
    phases = phase_seconds(curves)
    rollout = sum(phases.get(phase, 0.0) for phase in ("collect", "reset", "step"))
    return {phase: phases.get(phase, 0.0) / rollout if rollout else float("nan") for phase in ("reset", "step")}


def training_minutes(timings: Mapping[tuple[str, str], Curves]) -> dict[tuple[str, str], float]:
    """(environment, method) -> mean minutes of a training over seeds; wall-clock, each training has one thread of its own."""
    ends = {key: [rows[-1]["seconds"] for rows in curves.values() if rows] for key, curves in timings.items()}
    return {key: float(np.mean(seconds)) / 60 for key, seconds in ends.items() if seconds}
