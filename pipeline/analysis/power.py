"""What a comparison could have seen, and what it would take to decide it: from its own variances."""

import math

import scipy.optimize
import scipy.stats

from pipeline.analysis.intervals import TwoWay, expected
from pipeline.settings.params import Family

POWER = 0.8
"""Share of repetitions in which a difference of that size would be seen."""
MOST_SEEDS = 1000
"""Beyond so many none are counted."""
FEWEST = 5
"""Seeds below which nothing is judged: the intervals have not been tried with fewer (docs/statistics.md)."""


def strictest(alpha: float, size: int, family: Family) -> float:
    """The p that the first of a family's comparisons must not exceed: Holm's first step, or all of them at once."""
    return alpha / size if family == "holm" else alpha


def least_seeds(size: int, alpha: float = 0.05, family: Family = "holm") -> int:
    """Fewest paired seeds with which a verdict is possible in a family of that size.

    The least p of n sign flips is 2 / 2**n, that of all seeds on one side: 6 seeds for one comparison, 8 for four.
    """
    return max(FEWEST, math.ceil(math.log2(2 / strictest(alpha, size, family)) - 1e-9))


def detectable(parts: TwoWay, seeds: int, alpha: float) -> float | None:
    """Smallest difference that is called better or worse in 80 % of repetitions, at a p of at most ``alpha``.

    None where so few seeds can never reach that p. Where they reach it only if all lie on one side, that is asked too.
    """
    if seeds < least_seeds(1, alpha):
        return None
    error, freedom = float(parts.error), float(parts.freedom)
    if error == 0:
        return 0.0
    return max(error * _shift(alpha, freedom), _one_side(seeds, alpha) * _spread(parts, seeds))


def seeds_needed(parts: TwoWay, states: int, alpha: float, smallest_effect: float) -> int | None:
    """About how many seeds on these states would decide, with power 80 %, whichever of two is true.

    Of a difference of ``smallest_effect``, better or worse; of none, equivalent. None: more than ``MOST_SEEDS``, or
    however many, because the states are too few (``states_needed``).
    """
    least = least_seeds(1, alpha)
    enough = [n for n in _trials(least) if _decides(parts, n, states, alpha, smallest_effect)]
    if not enough:
        return None
    high = enough[0]
    below = [n for n in _trials(least) if n < high]
    low = below[-1] if below else least - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _decides(parts, middle, states, alpha, smallest_effect) else (middle, high)
    return high


def states_needed(parts: TwoWay, states: int, alpha: float, smallest_effect: float) -> int | None:
    """States of which at most half the error comes that may be, where more seeds alone cannot decide; else None."""
    allowed = (smallest_effect / _needed(alpha, math.inf)) ** 2
    if float(parts.state) / states <= allowed:
        return None
    return math.ceil(2 * float(parts.state) / allowed)


def _trials(least: int) -> list[int]:
    """Numbers of seeds between which one is sought: doubled up to the most."""
    found = [least]
    while found[-1] < MOST_SEEDS:
        found.append(min(2 * found[-1], MOST_SEEDS))
    return found


def _decides(parts: TwoWay, seeds: int, states: int, alpha: float, smallest_effect: float) -> bool:
    error, freedom = expected(parts, seeds, states)
    return error * _needed(alpha, freedom) <= smallest_effect


def _needed(alpha: float, freedom: float) -> float:
    """Standard errors in the smallest effect with which both questions are decided."""
    return max(_shift(alpha, freedom), _equivalence(alpha, freedom))


def _shift(alpha: float, freedom: float) -> float:
    """Standard errors between zero and a difference that a two-sided t test finds with power 80 %."""
    if not math.isfinite(freedom):
        return float(scipy.stats.norm.ppf(1 - alpha / 2) + scipy.stats.norm.ppf(POWER))
    critical = scipy.stats.t.ppf(1 - alpha / 2, freedom)
    start = critical + scipy.stats.t.ppf(POWER, freedom)
    return float(
        scipy.optimize.brentq(
            lambda shift: scipy.stats.nct.sf(critical, freedom, shift) - POWER, 0.0, 2 * start + 10, xtol=1e-6
        )
    )


def _equivalence(alpha: float, freedom: float) -> float:
    """Standard errors between zero and a bound that two one-sided t tests keep within with power 80 % at no difference."""
    law = scipy.stats.norm if not math.isfinite(freedom) else scipy.stats.t(freedom)
    return float(law.ppf(1 - alpha) + law.ppf((1 + POWER) / 2))


def _one_side(seeds: int, alpha: float) -> float:
    """Standard deviations of a seed's difference with which all seeds lie on one side in 80 % of repetitions.

    Zero unless the sign flips of so few seeds need that: with one more the next patterns count too.
    """
    if 4 / 2**seeds <= alpha:
        return 0.0
    return float(scipy.stats.norm.ppf(POWER ** (1 / seeds)))


def _spread(parts: TwoWay, seeds: int) -> float:
    """Standard deviation of a seed's difference, from the error of the mean."""
    return float(parts.error) * math.sqrt(seeds)
