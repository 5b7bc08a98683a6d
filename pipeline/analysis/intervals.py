"""Intervals of means over training seeds and initial states, both seen as drawn from more of their kind.

The design is crossed: every seed plays the same initial states. So the variance of the mean of a grid has three parts,
of seeds, of states, and of what is left over (their interaction and the sampling of episodes). They are estimated from
the mean squares of a two-way analysis of variance, whose combination has about a chi-squared distribution with
Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). What coverage that has is simulated: docs/statistics.md.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

LEVEL = 0.95
"""Coverage that all intervals aim at."""
FLOOR = 0.7
"""Least variance of a mean, in mean squares of what is left over: the estimate by itself can be zero and below."""
NOTHING = 1e-12
"""Part of a grid's largest number below which a deviation is rounding."""

Numbers = float | np.floating | np.ndarray
"""One number or many."""

Grid = Float[np.ndarray, "seeds states"]
"""Means over the episodes of a seed on an initial state, of a method or of a paired difference."""


class Interval(NamedTuple):
    """Bounds of a 95 % interval, low <= high."""

    low: float
    high: float


class TwoWay(NamedTuple):
    """A grid's mean, and how sure it is; arrays over the grids where there are several."""

    mean: np.ndarray
    error: np.ndarray
    """Standard error of the mean, over new seeds and new states."""
    freedom: np.ndarray
    """Degrees of freedom of that error."""
    seed: np.ndarray
    """Variance between seeds, >= 0; the other parts of the variance of one cell are the next two."""
    state: np.ndarray
    residual: np.ndarray

    def p_value(self) -> np.ndarray:
        """Two-sided p of a mean of zero, in [0, 1]."""
        return np.asarray(np.minimum(1.0, 2 * self.above(-np.abs(self.mean))))

    def above(self, shift: Numbers) -> np.ndarray:
        """P(T > -shift / error): one-sided p of a mean that lies ``-shift`` above its bound. Without an error 0, 1/2 or 1."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.error > 0, -shift / self.error, np.sign(-np.asarray(shift)) * np.inf)
        return np.asarray(scipy.stats.t.sf(np.nan_to_num(ratio, nan=0.0, posinf=np.inf, neginf=-np.inf), self.freedom))


def two_way(grids: Float[np.ndarray, "*trials seeds states"]) -> TwoWay:
    """The random-effects estimates of one grid or of many.

    With one state the error is that of a plain t over seeds. Needs two seeds.

    Raises:
        ValueError: fewer than two seeds, or no state.
    """
    n, m = grids.shape[-2:]
    if n < 2 or m < 1:
        raise ValueError(f"a grid of {n} seeds x {m} states has no error: at least 2 seeds and 1 state")
    mean = grids.mean(axis=(-2, -1))
    rows, columns = grids.mean(axis=-1), grids.mean(axis=-2)
    ms_seed = m * np.square(rows - mean[..., None]).sum(axis=-1) / (n - 1)
    if m > 1:
        rest = grids - rows[..., :, None] - columns[..., None, :] + mean[..., None, None]
        ms_state = n * np.square(columns - mean[..., None]).sum(axis=-1) / (m - 1)
        ms_rest = np.square(rest).sum(axis=(-2, -1)) / ((n - 1) * (m - 1))
    else:
        ms_state = ms_rest = np.zeros_like(ms_seed)
    least = np.square(NOTHING * np.abs(grids).max(axis=(-2, -1)))
    ms_seed, ms_state, ms_rest = (np.where(ms > least, ms, 0.0) for ms in (ms_seed, ms_state, ms_rest))

    total = np.maximum(ms_seed + ms_state - ms_rest, FLOOR * ms_rest)
    parts = (
        mean,
        np.sqrt(total / (n * m)),
        _freedom(total, ms_seed, ms_state, ms_rest, n, m),
        np.maximum(0.0, ms_seed - ms_rest) / m,
        np.maximum(0.0, ms_state - ms_rest) / n,
        ms_rest,
    )
    return TwoWay(*map(np.asarray, parts))


def expected(parts: TwoWay, seeds: int, states: int) -> tuple[float, float]:
    """Standard error and degrees of freedom of a mean over so many seeds and states, from one grid's parts."""
    ms_rest = float(parts.residual)
    ms_seed, ms_state = states * float(parts.seed) + ms_rest, seeds * float(parts.state) + ms_rest
    if states == 1:
        ms_state = ms_rest
    total = ms_seed + ms_state - ms_rest
    return math.sqrt(total / (seeds * states)), float(_freedom(total, ms_seed, ms_state, ms_rest, seeds, states))


def interval(grid: Grid) -> Interval | None:
    """95 % interval of a grid's mean, over new seeds and states; None with a single seed, or if a cell is not a number."""
    if len(grid) < 2 or not np.isfinite(grid).all():
        return None
    return bounds_of(two_way(grid))


def bounds_of(parts: TwoWay) -> Interval:
    """95 % interval of one grid's mean."""
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, parts.freedom) * parts.error)
    return Interval(float(parts.mean) - half, float(parts.mean) + half)


def _freedom(total: Numbers, ms_seed: Numbers, ms_state: Numbers, ms_rest: Numbers, n: int, m: int) -> np.ndarray:
    """Satterthwaite's degrees of freedom of seeds + states - rest, at least those of the smaller of the two factors.

    At the floor neither factor varies for all one can see: what is estimated there is the rest.
    """
    if m == 1:
        return np.full(np.shape(total), n - 1.0)
    spread = np.square(ms_seed) / (n - 1) + np.square(ms_state) / (m - 1) + np.square(ms_rest) / ((n - 1) * (m - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(spread > 0, np.square(total) / spread, np.inf)
    found = np.clip(found, min(n, m) - 1.0, (n - 1.0) * (m - 1.0))
    return np.where(ms_seed + ms_state - ms_rest < FLOOR * ms_rest, (n - 1.0) * (m - 1.0), found)
