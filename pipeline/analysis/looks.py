"""Looking at a comparison again and again while seeds are added, at levels that keep its error: group-sequential tests.

Who looks seven times at 5 % is wrong in about 17 % of comparisons of equal methods. So the error is spent: by the look with
n of at most N seeds, ``alpha * (n / N) ** POWER`` of it at most (Lan and DeMets 1983; the power family of Jennison and
Turnbull 2000, ch. 7). Means over seeds at successive looks are correlated as sums of independent terms are; the level of
each look follows from that by numerical integration (Armitage, McPherson and Rowe 1969).

All looks are computed again from the seeds' results, in their order. So decisions depend on data alone: whoever is killed
and starts again takes the same ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
from scipy.special import ndtr

from pipeline.analysis.hypotheses import Hypothesis, declared, judged
from pipeline.analysis.scores import Scores, of_seeds, rounded, significant
from pipeline.analysis.verdicts import ALPHA, Difference, Verdict
from pipeline.settings.params import Config
from pipeline.settings.seeds import SeedsUntil

POWER = 1.5
"""Of the spending function; docs/statistics.md has the simulations by which it was chosen."""
NODES = 200
"""Of the quadrature between the boundaries: levels are then exact to eight digits."""
OPEN = (None, "undecided")
"""Verdicts after which seeds are added."""

Judged = Callable[[Sequence[int], float], Mapping[Hypothesis, Difference]]
"""All declared comparisons over these seeds, judged at this level."""


def spent(counts: Sequence[int], alpha: float, power: float = POWER) -> tuple[float, ...]:
    """The error that may have been spent by each look, of ``alpha``, with this many seeds at the looks."""
    return tuple(alpha * (count / counts[-1]) ** power for count in counts)


@cache
def levels(counts: tuple[int, ...], alpha: float, family: int = 1, power: float = POWER) -> tuple[float, ...]:
    """The two-sided level of each look, at which a family is adjusted as it would be at ``alpha`` if looked at once.

    Zero at a look with so few seeds that their sign flips cannot reach its level: it spends nothing, and the next one may
    spend more.

    Args:
        counts: seeds at each look, rising.
        alpha: error of all looks together, in (0, 1).
        family: comparisons that share ``alpha``. The levels are those of a share ``alpha / family``, times the family:
            the smaller an error, the less the looks' correlation saves, so that this holds for each step of Holm's too.
        power: of the spending function.
    """
    found: list[float] = []
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    # The sum over seeds at this look, among comparisons that have not crossed: where, and how much of them.
    at, mass, used = np.zeros(1), np.ones(1), 0.0
    since = 0
    for count, allowed in zip(counts, spent(counts, alpha / family, power), strict=True):
        spread = math.sqrt(count - since)
        bound = _bound(at, mass, spread, allowed - used)
        level = 2 * float(ndtr(-bound / math.sqrt(count)))
        if level < 2 / 2**count:
            found.append(0.0)
            continue
        found.append(min(1.0, family * level))
        following = nodes * bound
        mass = (scipy.stats.norm.pdf((following[:, None] - at) / spread) / spread) @ mass * weights * bound
        at, used, since = following, allowed, count
    return tuple(found)


def _bound(at: np.ndarray, mass: np.ndarray, spread: float, allowed: float) -> float:
    """Beyond which, either way, a share ``allowed`` comes from ``at`` by a normal step of this standard deviation."""

    def crossing(bound: float) -> float:
        return float(mass @ (ndtr((at - bound) / spread) + ndtr((-bound - at) / spread)))

    farthest = float(np.abs(at).max()) + 40 * spread
    return float(scipy.optimize.brentq(lambda bound: crossing(bound) - allowed, 0.0, farthest))


@dataclass(frozen=True)
class Look:
    """One look at all declared comparisons."""

    number: int
    """From 1."""
    seeds: tuple[int, ...]
    spent: float
    """The error that may have been spent by now."""
    level: float
    """At which this look has judged; 0 if it could not."""
    differences: Mapping[Hypothesis, Difference]
    """As judged at this look, but that a verdict of an earlier one stays."""
    decided_at: Mapping[Hypothesis, int]
    """With how many seeds a verdict has fallen, of those that have one."""

    @property
    def decided(self) -> bool:
        """Whether the comparison ends here: no primary hypothesis is open, or without any none at all."""
        awaited = [one for one in self.differences if one.primary] or list(self.differences)
        return all(one in self.decided_at for one in awaited)


def looks_of(config: Config, scores: Mapping[tuple[str, str], Scores]) -> list[Look]:
    """The looks at a comparison whose seeds are added until it is decided, from its headline scores so far.

    Args:
        config: with the seeds in effect.
        scores: of (environment, method).

    Raises:
        ValueError: seeds are no rule's, or two methods share no seed or no state.
    """
    if config.seeds_until is None:
        raise ValueError("seeds are a list: there is one look at all of them")

    def judged_at(seeds: Sequence[int], level: float) -> dict[Hypothesis, Difference]:
        return judged(config, {key: of_seeds(one, seeds) for key, one in scores.items()}, level)

    sharing = len(declared(config)) if config.compare.family == "holm" else 1
    return take_looks(config.seeds_until, config.seeds, ALPHA, max(1, sharing), judged_at)


def take_looks(rule: SeedsUntil, seeds: Sequence[int], alpha: float, family: int, judged: Judged) -> list[Look]:
    """All looks at a comparison with these seeds in effect, up to the one at which it is decided.

    Args:
        rule: when to look.
        seeds: those in effect, in order; at least the first look's.
        alpha: error of all looks together.
        family: comparisons that share it.
        judged: is asked once per look.
    """
    looks: list[Look] = []
    decided_at: dict[Hypothesis, int] = {}
    verdicts: dict[Hypothesis, Verdict | None] = {}
    plan = zip(rule.counts, spent(rule.counts, alpha), levels(rule.counts, alpha, family), strict=True)
    for number, (count, used, level) in enumerate(plan, start=1):
        if count > len(seeds) or (looks and looks[-1].decided):
            break
        found = judged(seeds[:count], level or alpha)
        for one, difference in found.items():
            if level and one not in decided_at and difference.verdict not in OPEN:
                decided_at[one] = count
                verdicts[one] = difference.verdict
        told = {
            one: replace(difference, verdict=verdicts.get(one, difference.verdict if level else None))
            for one, difference in found.items()
        }
        looks.append(Look(number, tuple(seeds[:count]), used, level, told, dict(decided_at)))
    return looks


def next_count(rule: SeedsUntil, looks: Sequence[Look]) -> int:
    """How many seeds the comparison needs now: those of its last look if that has ended it, else a batch more."""
    last = looks[-1]
    return len(last.seeds) if last.decided else rule.counts[min(last.number, len(rule.counts) - 1)]


def look_entry(rule: SeedsUntil, looks: Sequence[Look]) -> dict[str, Any]:
    """The looks as comparison.json has them: where the comparison stands, and what each look has found."""
    last = looks[-1]
    return {
        "number": last.number,
        "of": len(rule.counts),
        "seeds": len(last.seeds),
        "at_most": rule.at_most,
        "level": significant(last.level),
        "decided": last.decided,
        "next_seeds": next_count(rule, looks),
        "looks": [_taken(look) for look in looks],
    }


def _taken(look: Look) -> dict[str, Any]:
    return {
        "number": look.number,
        "seeds": list(look.seeds),
        "spent": significant(look.spent),
        "level": significant(look.level),
        "decided": look.decided,
        "hypotheses": [
            {
                **asdict(one),
                "value": rounded(difference.value),
                "p": significant(difference.p),
                "p_adjusted": significant(difference.p_adjusted),
                "p_equivalence": significant(difference.p_equivalence),
                "verdict": difference.verdict,
                "decided_at": look.decided_at.get(one),
            }
            for one, difference in look.differences.items()
        ],
    }
