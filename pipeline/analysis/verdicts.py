"""The one rule by which two methods are called better, worse, equivalent or undecided.

A difference has two p values, and the greater one counts: exact sign flips of the paired seeds (no assumption but that a
seed's difference is as likely up as down where there is none) and the two-way t of its interval (new states too). Within
a family they are adjusted for its size. Equivalence is two one-sided t tests against the smallest effect that matters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.stats
from jaxtyping import Float

from pipeline.analysis.intervals import Grid, Interval, Numbers, TwoWay, bounds_of, two_way
from pipeline.analysis.power import detectable, least_seeds, seeds_needed, states_needed, strictest
from pipeline.settings.params import Family
from pipeline.workspace.randomness import generator

Verdict = Literal["better", "worse", "equivalent", "undecided"]

ALPHA = 0.05
"""Error rate of a family's verdicts."""
FLIPS = 2**15
"""Sign flips of a test: all of them up to 15 seeds, so many drawn beyond."""
ROUNDING = 1e-12
"""Part of the sum of all sizes by which two sums may differ and be equal."""


@dataclass(frozen=True)
class Difference:
    """Success of one method minus that of another, in [-1, 1], or another number of trainings minus that of others."""

    value: float
    """Mean over the paired seeds and states."""
    interval: Interval | None
    """95 %, over new seeds and states, not adjusted for the family; None with one seed."""
    by_seed: tuple[float, ...]
    """Of each paired seed, in the order of seeds."""
    p: float | None = None
    """Of no difference; None with one seed."""
    p_adjusted: float | None = None
    """Within the family; None of a comparison that is in none."""
    p_equivalence: float | None = None
    """Of a difference of at least the smallest effect, adjusted within the family."""
    verdict: Verdict | None = None
    """None where none may be: not declared, too few seeds (``least_seeds``), or not a number."""
    detectable: float | None = None
    """Smallest difference that this run could have seen with power 80 %; None where it could not see any."""
    seeds_needed: int | None = None
    """About how many seeds on these states would decide it."""
    states_needed: int | None = None
    """About how many states it would take, where more seeds alone cannot decide it."""
    alarmed: tuple[str, ...] = ()
    """Of what is compared that in which trainings have alarmed."""


def judge(
    grids: Sequence[Float[np.ndarray, "_ _"]],
    family: Family = "holm",
    smallest_effect: float = 0.05,
    alpha: float = ALPHA,
) -> list[Difference]:
    """Judge all comparisons of one family together: paired differences in, verdicts out, in the same order.

    Args:
        grids: of each comparison, method minus other: a row per paired seed, a column per initial state. Their numbers
            may differ between comparisons.
        family: ``holm`` bounds the chance of any wrong verdict, ``screening`` (Benjamini-Hochberg) their share.
        smallest_effect: below it two methods are as good as equal.
        alpha: error rate; a look at unfinished data passes a smaller one.
    """
    found = [measure(grid) for grid in grids]
    tested = [index for index, one in enumerate(found) if one.p is not None]
    if not tested:
        return found
    parts = {index: two_way(np.asarray(grids[index], dtype=float)) for index in tested}
    # A family is as large as it was declared: a comparison that could not be tested counts as one that showed nothing.
    differing, equal = np.ones(len(found)), np.ones(len(found))
    differing[tested] = [found[index].p for index in tested]
    equal[tested] = [equivalence_p(parts[index], smallest_effect) for index in tested]
    differing, equal = adjusted(differing, family), adjusted(equal, family)
    bound = strictest(alpha, len(found), family)
    for index in tested:
        one, seeds, states = found[index], len(grids[index]), grids[index].shape[1]
        enough = seeds >= least_seeds(len(found), alpha, family)
        word: Verdict = words(one.value, differing[index], equal[index], alpha).item()
        undecided = word == "undecided" or not enough
        found[index] = replace(
            one,
            p_adjusted=float(differing[index]),
            p_equivalence=float(equal[index]),
            verdict=word if enough else None,
            detectable=detectable(parts[index], seeds, bound),
            seeds_needed=seeds_needed(parts[index], states, bound, smallest_effect) if undecided else None,
            states_needed=states_needed(parts[index], states, bound, smallest_effect) if undecided else None,
        )
    return found


def measure(grid: Grid) -> Difference:
    """A difference that belongs to no family: its value, interval and p, and no verdict."""
    by_seed = grid.mean(axis=1)
    value, seeds = float(by_seed.mean()), tuple(map(float, by_seed))
    if len(grid) < 2 or not math.isfinite(value):
        return Difference(value, None, seeds)
    parts = two_way(np.asarray(grid, dtype=float))
    return Difference(value, bounds_of(parts), seeds, float(difference_p(parts, by_seed)))


def difference_p(parts: TwoWay, means: Float[np.ndarray, "*trials seeds"], flips: int = FLIPS) -> np.ndarray:
    """p of no difference: the greater one of sign flips and t."""
    return np.asarray(np.maximum(parts.p_value(), sign_flip_p(means, flips)))


def equivalence_p(parts: TwoWay, smallest_effect: float) -> np.ndarray:
    """p of a difference of the smallest effect or more, either way: the greater one of two one-sided t tests."""
    sides = (parts.above(-(smallest_effect - parts.mean)), parts.above(-(smallest_effect + parts.mean)))
    return np.asarray(np.maximum(*sides))


def sign_flip_p(means: Float[np.ndarray, "*trials seeds"], flips: int = FLIPS) -> np.ndarray:
    """Two-sided p of paired seeds' mean differences under flips of their signs; exact up to log2(flips) seeds.

    Beyond, as many flips are drawn, always the same ones, and the data themselves are counted among them. The test is that
    of ``scipy.stats.permutation_test`` with ``permutation_type="samples"``, of many grids at once.
    """
    seeds = means.shape[-1]
    if exact := 2**seeds <= flips:
        patterns = 1.0 - 2.0 * ((np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1)
    else:
        patterns = generator(0, "sign flips", seeds).choice([-1.0, 1.0], (flips, seeds))
    sums, own = np.abs(means @ patterns.T), np.abs(means.sum(axis=-1, keepdims=True))
    # Of equal sums none is the greater one for being rounded.
    as_far = (sums >= own - ROUNDING * np.abs(means).sum(axis=-1, keepdims=True)).sum(axis=-1)
    return np.asarray(as_far / 2**seeds if exact else (as_far + 1) / (flips + 1))


def adjusted(p: Float[np.ndarray, "*trials family"], family: Family) -> np.ndarray:
    """p values for the size of their family: Holm (1979), or Benjamini-Hochberg where many are screened."""
    if family == "screening":
        return np.asarray(scipy.stats.false_discovery_control(p, axis=-1))
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.minimum(1.0, np.maximum.accumulate(steps, axis=-1)), axis=-1)
    return found


def words(value: Numbers, p_adjusted: Numbers, p_equivalence: Numbers, alpha: float = ALPHA) -> np.ndarray:
    """The verdict where one may be: a difference first, then equivalence. Adjusted p values in, of one or of many."""
    differs = np.where(np.asarray(value) > 0, "better", "worse")
    rest = np.where(np.asarray(p_equivalence) < alpha, "equivalent", "undecided")
    return np.where(np.asarray(p_adjusted) < alpha, differs, rest)
