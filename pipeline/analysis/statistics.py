"""Estimates and intervals of success, over training seeds and initial states.

The design is crossed: every seed of every method plays the same initial states. The interval of a single method's
success therefore resamples seeds and states independently of each other and keeps the whole grid (the pigeonhole
bootstrap of Owen 2007, arXiv 0712.1111, after McCullagh 2000); episodes of one seed and state are averaged first.

Read as a test of two methods it would be wrong too often where seeds vary most, and without power where states do. So a
difference has another one, the t-interval over paired seed means, and ``verdict`` is read from that alone.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.stats
from jaxtyping import Float
from rliable import metrics as rliable

T = TypeVar("T")

Success = Float[np.ndarray, "seeds states rollouts"]
"""1 for a solved episode, 0 for any other."""

Verdict = Literal["higher", "lower", "not told apart"]

LEVEL = 0.95
"""Coverage that all intervals aim at."""
VERDICT_SEEDS = 6
"""Fewest paired seeds of a verdict. Of equal methods all five of five seeds have the same sign in 2 / 2**5 = 6 %."""


@dataclass(frozen=True)
class Scores:
    """The episodes of one method at one temperature, as a balanced grid."""

    seeds: tuple[int, ...]
    states: tuple[str, ...]
    """Keys of the initial states, sorted."""
    success: Success


class Interval(NamedTuple):
    """Bounds of a 95 % interval, low <= high."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Success of one method minus that of another, in [-1, 1]."""

    value: float
    """Mean over the paired seeds."""
    interval: Interval | None
    """95 % t-interval over the paired seeds' means; None below ``VERDICT_SEEDS``: it would be read as a verdict."""
    by_seed: tuple[float, ...]
    """Of each paired seed, in the order of seeds."""

    @property
    def verdict(self) -> Verdict | None:
        """What may be said of the two methods: the one rule of every table, text, page and figure.

        None where nothing may be: below ``VERDICT_SEEDS`` paired seeds, or if the interval is not a number.
        """
        if self.interval is None or len(self.by_seed) < VERDICT_SEEDS:
            return None
        low, high = self.interval
        if math.isnan(low) or math.isnan(high):
            return None
        return "higher" if low > 0 else "lower" if high < 0 else "not told apart"


def balanced_scores(table: pa.Table, temperature: float) -> Scores:
    """The grid of one temperature, of per-episode results (``evaluate.episode_results``) of one environment and method.

    Raises:
        ValueError: no episode at this temperature, or an episode is missing, is there twice or has no result; the first
            one is named.
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
    name = f"{name} at temperature {temperature:g}"

    def episode(cell: np.ndarray) -> str:
        seed, state, rollout = (values[i] for values, i in zip(labels, cell, strict=True))
        return f"seed {seed}, state {str(state)!r}, rollout {rollout}"

    wrong = np.argwhere(counts != 1)
    if len(wrong):
        what = "is missing" if counts[tuple(wrong[0])] == 0 else "is there more than once"
        raise ValueError(
            f"{name}: unbalanced, {episode(wrong[0])} {what} ({len(wrong)} such of {counts.size}); "
            "evaluate every seed on the same states"
        )
    success = np.empty(counts.shape)
    success[places] = np.array(rows["success"].to_pylist(), dtype=float)
    for cell in np.argwhere(np.isnan(success)):
        raise ValueError(f"{name}: {episode(cell)} has no result")
    return Scores(tuple(int(s) for s in labels[0]), tuple(str(s) for s in labels[1]), success)


def interquartile_mean(success: Success) -> float:
    """Mean of the middle half of the scores of (seed, state) pairs, in [0, 1].

    rliable's convention (Agarwal et al. 2021, arXiv 2108.13264): a matrix of runs x tasks, here seeds x initial
    states, each score the mean over its rollouts, trimmed over the whole matrix (of fewer than four none is left out).
    """
    return float(rliable.aggregate_iqm(success.mean(axis=2)))


def resampled_means(
    scores: Float[np.ndarray, "seeds states"], resamples: int, draws: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    """Means of resampled grids: seeds with replacement and, independently, states with replacement.

    How often a row is drawn is multinomial, so a resample is two vectors of counts and its mean a bilinear form.
    """
    seed_counts, state_counts = (
        draws.multinomial(items, np.full(items, 1 / items), size=resamples).astype(float) for items in scores.shape
    )
    return np.asarray(((seed_counts @ scores) * state_counts).sum(axis=1) / scores.size)


def bootstrap_interval(success: Success, resamples: int, draws: np.random.Generator) -> Interval:
    """95 % percentile interval of the mean; with a single seed only the states are resampled."""
    means = resampled_means(success.mean(axis=2), resamples, draws)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def t_interval(success: Success) -> Interval | None:
    """95 % t-interval over the seeds' means, None with a single seed.

    It speaks about new trainings on these same initial states, and is not cut off at 0 and 1.
    """
    return _t_interval(success.mean(axis=(1, 2)))


def paired_difference(x: Scores, y: Scores) -> Difference:
    """Mean of x - y on common seeds and states; seeds are paired, states are taken as they are.

    Raises:
        ValueError: no seed or no state in common.
    """
    seeds, states = _common(x.seeds, y.seeds, "seed"), _common(x.states, y.states, "state")
    x_solved, y_solved = _solved(x, y), _solved(y, x)
    episodes = len(states) * x.success.shape[2] * y.success.shape[2]
    by_seed = np.array([x_solved[seed] - y_solved[seed] for seed in seeds]) / episodes
    interval = _t_interval(by_seed) if len(seeds) >= VERDICT_SEEDS else None
    return Difference(float(by_seed.mean()), interval, tuple(map(float, by_seed)))


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """Share of the pairs of trainings in which x scores above y: P(X > Y) + P(X = Y) / 2 over all pairs of seeds.

    rliable's estimate with one task, the environment, and a seed's mean over the common states as its score. It
    describes these trainings; whether the methods can be told apart is for ``paired_difference`` to say.

    Raises:
        ValueError: no state in common.
    """
    scores = (np.array([*_solved(*pair).values()])[:, None] for pair in ((x, y), (y, x)))
    return float(rliable.probability_of_improvement(*scores))


def significant(value: float) -> float | None:
    """Six significant digits, so that equal results are equal text; None if undefined, because JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _t_interval(means: Float[np.ndarray, " seeds"]) -> Interval | None:
    if len(means) < 2:
        return None
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return Interval(float(means.mean()) - half, float(means.mean()) + half)


def _common(a: tuple[T, ...], b: tuple[T, ...], what: str) -> tuple[T, ...]:
    others = set(b)
    common = tuple(item for item in a if item in others)
    if not common:
        raise ValueError(f"no {what} in common, nothing to compare: {a[:3]} and {b[:3]}")
    return common


def _solved(own: Scores, other: Scores) -> dict[int, float]:
    """Seed -> solved episodes on the common states, times the rollouts of the other.

    On this scale both have whole numbers: equals differ by zero in floating point too, and ties are ties.
    """
    common = np.isin(own.states, _common(own.states, other.states, "state"))
    totals = own.success[:, common].sum(axis=(1, 2)) * other.success.shape[2]
    return dict(zip(own.seeds, totals.tolist(), strict=True))
