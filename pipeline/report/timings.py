"""Where the time of a training goes, and how much of a rollout is the environment's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.analysis.comparison import Curves
from pipeline.report.comparison_tables import Table

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


def time_table(environment: str, timings: Mapping[tuple[str, str], Curves]) -> Table:
    """Shares of an iteration by phase, a row per method of an environment; the longest phases first."""
    spent = {method: phase_seconds(curves) for (place, method), curves in timings.items() if place == environment}
    total = {method: sum(phases.values()) for method, phases in spent.items()}
    names = sorted({phase for phases in spent.values() for phase in phases})
    names.sort(key=lambda name: -sum(phases.get(name, 0.0) for phases in spent.values()))
    return Table(
        f"{environment}, time of an iteration",
        ["method", "seconds", *names, "resets in rollouts", "steps in rollouts"],
        [
            [
                method,
                f"{total[method]:.2f}",
                *(f"{phases.get(name, 0.0) / total[method]:.1%}" for name in names),
                *(f"{share:.1%}" for share in environment_shares(timings[environment, method]).values()),
            ]
            for method, phases in spent.items()
            if total[method]
        ],
    )
