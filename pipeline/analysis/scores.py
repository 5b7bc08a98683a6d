"""Success of trainings as grids: seeds by initial states by episodes, and what is read from them without a test.

The design is crossed: every seed of every method plays the same initial states. So two methods are compared cell by cell,
on the seeds and states that they have in common.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from rliable import metrics as rliable

from pipeline.analysis.intervals import Grid

T = TypeVar("T")

Success = Float[np.ndarray, "seeds states rollouts"]
"""1 for a solved episode, 0 for any other."""


@dataclass(frozen=True)
class Scores:
    """The episodes of one method at one temperature, as a balanced grid."""

    seeds: tuple[int, ...]
    states: tuple[str, ...]
    """Keys of the initial states, sorted."""
    success: Success

    @property
    def grid(self) -> Grid:
        """Share of the solved episodes of every seed and state, in [0, 1]."""
        return np.asarray(self.success.mean(axis=2))


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


def of_seeds(scores: Scores, seeds: Collection[int]) -> Scores:
    """The part of a grid that has these seeds, in its own order."""
    kept = [place for place, seed in enumerate(scores.seeds) if seed in seeds]
    return Scores(tuple(scores.seeds[place] for place in kept), scores.states, scores.success[kept])


def interquartile_mean(success: Success) -> float:
    """Mean of the middle half of the scores of (seed, state) pairs, in [0, 1].

    rliable's convention (Agarwal et al. 2021, arXiv 2108.13264): a matrix of runs x tasks, here seeds x initial
    states, each score the mean over its rollouts, trimmed over the whole matrix (of fewer than four none is left out).
    """
    return float(rliable.aggregate_iqm(success.mean(axis=2)))


def paired_grid(x: Scores, y: Scores) -> Grid:
    """x - y of every seed and state that both have, in [-1, 1]; rows and columns are in the order of x.

    Raises:
        ValueError: no seed or no state in common.
    """
    seeds, states = shared(x.seeds, y.seeds, "seed"), shared(x.states, y.states, "state")
    mine, theirs = (
        one.success[np.ix_([one.seeds.index(s) for s in seeds], [one.states.index(s) for s in states])].sum(axis=2)
        for one in (x, y)
    )
    # Whole numbers up to here: equals differ by zero in floating point too.
    mine_episodes, their_episodes = x.success.shape[2], y.success.shape[2]
    return np.asarray((mine * their_episodes - theirs * mine_episodes) / (mine_episodes * their_episodes))


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """Share of the pairs of trainings in which x scores above y: P(X > Y) + P(X = Y) / 2 over all pairs of seeds.

    rliable's estimate with one task, the environment, and a seed's mean over the common states as its score. It
    describes these trainings; whether the methods differ is for ``verdicts.judge`` to say.

    Raises:
        ValueError: no state in common.
    """
    scores = (np.array([*_solved(*pair).values()])[:, None] for pair in ((x, y), (y, x)))
    return float(rliable.probability_of_improvement(*scores))


def rounded(value: float | None) -> float | None:
    """To six digits; None stays, and is what has no finite value, because JSON has no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), 6) + 0.0  # + 0.0 makes -0.0 a zero


def significant(value: float | None) -> float | None:
    """Six significant digits, so that equal results are equal text; None as in ``rounded``."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def shared(a: tuple[T, ...], b: tuple[T, ...], what: str) -> tuple[T, ...]:
    """What both have, in the order of a.

    Raises:
        ValueError: they have nothing in common; ``what`` it would be is named.
    """
    others = set(b)
    common = tuple(item for item in a if item in others)
    if not common:
        raise ValueError(f"no {what} in common, nothing to compare: {a[:3]} and {b[:3]}")
    return common


def _solved(own: Scores, other: Scores) -> dict[int, float]:
    """Seed -> solved episodes on the common states, times the rollouts of the other.

    On this scale both have whole numbers: equals differ by zero in floating point too, and ties are ties.
    """
    common = np.isin(own.states, shared(own.states, other.states, "state"))
    totals = own.success[:, common].sum(axis=(1, 2)) * other.success.shape[2]
    return dict(zip(own.seeds, totals.tolist(), strict=True))
