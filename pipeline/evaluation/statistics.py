"""Estimates and intervals of success, over training seeds and initial states.

The design is crossed: every seed of every method plays the same initial states. Intervals therefore resample seeds and
states independently of each other and keep the whole grid (the pigeonhole bootstrap of Owen 2007, arXiv 0712.1111,
after McCullagh 2000); episodes of one seed and state are averaged first. A percentile bootstrap over few seeds tends
to be too narrow, which is why the t-interval over seed means stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.stats
from jaxtyping import Float
from rliable import metrics as rliable

T = TypeVar("T")

Success = Float[np.ndarray, "seeds states rollouts"]
"""1 for a solved episode, 0 for any other."""

LEVEL = 0.95
"""Coverage that all intervals aim at."""


@dataclass(frozen=True)
class Scores:
    """The episodes of one method at one temperature, as a balanced grid."""

    seeds: tuple[int, ...]
    states: tuple[str, ...]
    """Keys of the initial states, sorted."""
    success: Success


@dataclass(frozen=True)
class Interval:
    """Bounds of a 95 % interval, low <= high."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """An estimate about two methods."""

    value: float
    interval: Interval | None
    """None where the seeds do not suffice for one."""
    seeds: int
    """Seeds that entered it: the common ones of a difference, those of the smaller side of a probability."""


def balanced_scores(table: pa.Table, temperature: float) -> Scores:
    """The grid of one method's episodes at one temperature.

    Args:
        table: per-episode results of one environment and method, see ``evaluate.episode_results``.
        temperature: which of its temperatures.

    Raises:
        ValueError: no episode at this temperature, or an episode is missing or there twice; the first one is named.
    """
    environments, methods = (sorted(set(table[label].to_pylist())) for label in ("environment", "method"))
    name = f"{'+'.join(environments)}-{'+'.join(methods)}"
    if len(environments) > 1 or len(methods) > 1:
        raise ValueError(f"{name}: the table must hold one environment and one method")
    rows = table.filter(pc.equal(table["temperature"], temperature))
    if not len(rows):
        found = ", ".join(f"{t:g}" for t in sorted(set(table["temperature"].to_pylist())))
        raise ValueError(f"{name}: no episodes at temperature {temperature:g}; there are: {found or 'none'}")

    columns = [np.array(rows[label].to_pylist()) for label in ("seed", "state", "rollout")]
    labels, places = zip(*(np.unique(column, return_inverse=True) for column in columns), strict=True)
    counts = np.zeros([len(values) for values in labels], dtype=np.int64)
    np.add.at(counts, places, 1)
    wrong = np.argwhere(counts != 1)
    if len(wrong):
        seed, state, rollout = (values[i] for values, i in zip(labels, wrong[0], strict=True))
        what = "is missing" if counts[tuple(wrong[0])] == 0 else "is there more than once"
        raise ValueError(
            f"{name} at temperature {temperature:g}: unbalanced, seed {seed}, state {str(state)!r}, rollout {rollout} "
            f"{what} ({len(wrong)} such of {counts.size}); evaluate every seed on the same states"
        )
    success = np.empty(counts.shape)
    success[places] = np.array(rows["success"].to_pylist(), dtype=float)
    return Scores(tuple(int(s) for s in labels[0]), tuple(str(s) for s in labels[1]), success)


def interquartile_mean(success: Success) -> float:
    """Mean of the middle half of the scores of (seed, state) pairs, in [0, 1].

    rliable's convention (Agarwal et al. 2021, arXiv 2108.13264): a matrix of runs x tasks, here seeds x initial
    states, each score the mean over its rollouts, trimmed over the whole matrix.
    """
    return float(rliable.aggregate_iqm(success.mean(axis=2)))


def resampled_means(
    scores: Float[np.ndarray, "seeds states"], resamples: int, draws: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    """Means of resampled grids: seeds with replacement and, independently, states with replacement.

    How often a row is drawn is multinomial, so a resample is two vectors of counts and its mean a bilinear form.
    """
    seeds, states = scores.shape
    seed_counts = _resampled_counts(seeds, resamples, draws)
    state_counts = _resampled_counts(states, resamples, draws)
    means: np.ndarray = ((seed_counts @ scores) * state_counts).sum(axis=1) / (seeds * states)
    return means


def bootstrap_interval(success: Success, resamples: int, draws: np.random.Generator) -> Interval:
    """95 % percentile interval of the mean; with a single seed only the states are resampled."""
    return _percentiles(resampled_means(success.mean(axis=2), resamples, draws))


def t_interval(success: Success) -> Interval | None:
    """95 % t-interval over the seeds' means, None with a single seed.

    It speaks about new trainings on these same initial states, and is not cut off at 0 and 1.
    """
    means = success.mean(axis=(1, 2))
    if len(means) < 2:
        return None
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return Interval(float(means.mean()) - half, float(means.mean()) + half)


def paired_difference(x: Scores, y: Scores, resamples: int, draws: np.random.Generator) -> Comparison:
    """Mean of x - y on common seeds and states, in [-1, 1]; a resample takes the same seeds and states of both.

    Raises:
        ValueError: no seed or no state in common.
    """
    seeds, states = _common(x.seeds, y.seeds, "seed"), _common(x.states, y.states, "state")
    difference = _cells(x, seeds, states) - _cells(y, seeds, states)
    interval = _percentiles(resampled_means(difference, resamples, draws))
    return Comparison(float(difference.mean()), interval, len(seeds))


def probability_of_improvement(x: Scores, y: Scores, resamples: int, draws: np.random.Generator) -> Comparison:
    """Chance that a new training of x scores above one of y: P(X > Y) + P(X = Y) / 2 over all pairs of seeds.

    rliable's estimate with one task, the environment, and a seed's mean over the common states as its score. The
    interval resamples the seeds of x, the seeds of y and, jointly, the states; None if either has a single seed.

    Raises:
        ValueError: no state in common.
    """
    states = _common(x.states, y.states, "state")
    # Whole numbers of solved episodes on a common scale, so that ties are ties in floating point too.
    x_totals = _cells(x, x.seeds, states, total=True) * y.success.shape[2]
    y_totals = _cells(y, y.seeds, states, total=True) * x.success.shape[2]
    value = float(
        rliable.probability_of_improvement(x_totals.sum(axis=1, keepdims=True), y_totals.sum(axis=1, keepdims=True))
    )
    smaller = min(len(x.seeds), len(y.seeds))
    if smaller < 2:
        return Comparison(value, None, smaller)
    state_counts = _resampled_counts(len(states), resamples, draws)
    above = state_counts @ x_totals.T
    below = state_counts @ y_totals.T
    wins = (np.sign(above[:, :, None] - below[:, None, :]) + 1) / 2
    x_counts = _resampled_counts(len(x.seeds), resamples, draws)
    y_counts = _resampled_counts(len(y.seeds), resamples, draws)
    means = np.einsum("bij,bi,bj->b", wins, x_counts, y_counts) / (len(x.seeds) * len(y.seeds))
    return Comparison(value, _percentiles(means), smaller)


def _resampled_counts(items: int, resamples: int, draws: np.random.Generator) -> np.ndarray:
    """How often each of the items is in a resample of their number; (resamples, items)."""
    return draws.multinomial(items, np.full(items, 1 / items), size=resamples).astype(float)


def _percentiles(means: np.ndarray) -> Interval:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _common(a: tuple[T, ...], b: tuple[T, ...], what: str) -> tuple[T, ...]:
    common = tuple(item for item in a if item in set(b))
    if not common:
        raise ValueError(f"no {what} in common, nothing to compare: {a[:3]} and {b[:3]}")
    return common


def _cells(scores: Scores, seeds: tuple[int, ...], states: tuple[str, ...], total: bool = False) -> np.ndarray:
    """Mean (or total) over rollouts of the named seeds and states, in that order; (seeds, states)."""
    rows = [scores.seeds.index(seed) for seed in seeds]
    place = {state: i for i, state in enumerate(scores.states)}
    cells = scores.success[np.ix_(rows, [place[state] for state in states])]
    result: np.ndarray = cells.sum(axis=2) if total else cells.mean(axis=2)
    return result
