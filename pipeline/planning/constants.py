"""How long work takes: seconds of a FLOP, a byte, a layer's start and a token, found from measurements.

``seconds = flops a + bytes b + layers c + tokens d`` of each phase, none of them negative. Nothing is taken to overlap: where
arithmetic hides what memory does, the fit finds one of the two smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from pipeline.planning.work import PHASES, Work

FITTED = {
    "prefill": "sampling",
    "decoding": "sampling",
    "annotation": "scoring",
    "values": "scoring",
    "update KL": "scoring",
}
"""Phases that have constants in common, for they compute alike -> what these are called; any other phase has its own."""
LEAST_SECONDS = 1e-4
"""Less is not timed: such a phase of a point is left out of a fit."""


class Constants(NamedTuple):
    """Seconds of one of each; see ``Work``."""

    flops: float
    bytes: float
    layers: float
    tokens: float

    def seconds(self, work: Work) -> float:
        return sum(constant * amount for constant, amount in zip(self, work, strict=True))


class Timed(NamedTuple):
    """One measured iteration."""

    name: str
    """What was measured."""
    shape: str
    """Name of the policy's size."""
    work: dict[str, Work]
    """By phase."""
    seconds: dict[str, float]
    """By name of the constants."""


Fit = Mapping[str, Constants]
"""By name of the constants."""


def constants_of(phase: str) -> str:
    """What the constants of a phase of ``PHASES`` are called."""
    return FITTED.get(phase, phase)


def predicted(fit: Fit, work: Mapping[str, Work]) -> dict[str, float]:
    """Seconds of each phase; of a phase that was never measured none."""
    return {
        phase: fit[constants_of(phase)].seconds(amount) if constants_of(phase) in fit else 0.0
        for phase, amount in work.items()
    }


def fitted(points: Sequence[Timed]) -> dict[str, Constants]:
    """The constants with the least relative errors, by non-negative least squares (Lawson and Hanson, 1974)."""
    result = {}
    for name in dict.fromkeys(map(constants_of, PHASES)):
        rows = [(_together(point, name), point.seconds.get(name, 0.0)) for point in points]
        rows = [(work, seconds) for work, seconds in rows if seconds > LEAST_SECONDS and any(work)]
        if rows:
            amounts = np.array([work for work, _ in rows]) / np.array([[seconds] for _, seconds in rows])
            scale = np.where(amounts.any(axis=0), np.abs(amounts).max(axis=0), 1.0)
            found = nnls(amounts / scale, np.ones(len(rows)))[0] / scale
            result[name] = Constants(*(float(value) for value in found))
    return result


def _together(point: Timed, name: str) -> Work:
    return Work().plus(*(work for phase, work in point.work.items() if constants_of(phase) == name))


class Miss(NamedTuple):
    """A point that was left out of the fit which predicts it."""

    point: str
    measured: float
    """Seconds of the iteration."""
    predicted: float
    by_name: dict[str, tuple[float, float]]
    """Seconds measured and predicted, by name of the constants."""

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def left_out(points: Sequence[Timed]) -> list[Miss]:
    """Every point, predicted from all the others."""
    return [_missed([*points[:index], *points[index + 1 :]], point) for index, point in enumerate(points)]


def larger_left_out(points: Sequence[Timed]) -> list[Miss]:
    """The points of the last size, predicted from those of all the others: what a fit is worth beyond what it has seen."""
    last = points[-1].shape
    rest = [point for point in points if point.shape != last]
    return [_missed(rest, point) for point in points if point.shape == last] if rest else []


def _missed(rest: Sequence[Timed], point: Timed) -> Miss:
    seconds = predicted(fitted(rest), point.work)
    names: dict[str, tuple[float, float]] = {}
    for name, measured in point.seconds.items():
        own = sum(value for phase, value in seconds.items() if constants_of(phase) == name)
        names[name] = (measured, own)
    return Miss(point.name, sum(m for m, _ in names.values()), sum(p for _, p in names.values()), names)
