"""What looking at a comparison again and again costs and saves: rules by their simulated errors and numbers of seeds.

Grids of paired differences are made up from a true difference and three variances, and judged by the functions that judge
every comparison. So the table of docs/statistics.md is about the product's own verdicts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.analysis.intervals import two_way
from pipeline.analysis.looks import POWER, levels, spent
from pipeline.analysis.verdicts import ALPHA, difference_p, equivalence_p, words
from pipeline.settings.seeds import SeedsUntil
from pipeline.workspace.randomness import generator

FLIPS, BATCH = 2**12, 50
"""Sign flips of a simulated test, and trials that are tested together."""
Levels = Callable[[tuple[int, ...]], Sequence[float]]
"""The level of each look, by the seeds at all of them; 0 where nothing can be decided."""


def _union(counts: tuple[int, ...]) -> Sequence[float]:
    """Each look has what the spending function adds: holds whatever the looks' correlation is."""
    return [float(share) for share in np.diff([0.0, *spent(counts, ALPHA)])]


RULES: Mapping[str, Levels] = {
    "one look at the most": lambda counts: [*[0.0] * (len(counts) - 1), ALPHA],
    "every look at 5 %": lambda counts: [ALPHA] * len(counts),
    f"spending, power {POWER:g}, union bound": _union,
    "spending, power 1 (equal shares per seed)": lambda counts: levels(counts, ALPHA, power=1.0),
    f"spending, power {POWER:g} (used)": lambda counts: levels(counts, ALPHA),
    "spending, power 3 (as O'Brien and Fleming)": lambda counts: levels(counts, ALPHA, power=3.0),
}
"""Rules by name."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a paired difference between two methods, in success."""

    name: str
    seed: float
    state: float
    rest: float
    """Of one seed on one state, interaction and sampled episodes together."""


SPREADS = (
    Spread("seeds vary most", 0.10, 0.02, 0.30),
    Spread("states vary most", 0.03, 0.15, 0.30),
    Spread("little varies", 0.03, 0.03, 0.20),
)


def simulate_looks(
    rule: SeedsUntil,
    effects: Sequence[float] = (0.0, 0.05, 0.1, 0.15),
    spreads: Sequence[Spread] = SPREADS,
    trials: int = 1000,
    states: int = 64,
    smallest_effect: float = 0.05,
    rules: Mapping[str, Levels] = RULES,
) -> list[dict[str, Any]]:
    """A row per spread, true difference and rule, of one comparison that is a family by itself.

    ``better``, ``worse``, ``equivalent`` and ``undecided`` are shares of the trials, ``wrong`` those of verdicts that are
    not true: of no difference better or worse, of another one the opposite, or equivalent if it is of the smallest effect
    or more. ``seeds`` is the mean number when it ends, ``value`` the mean estimate then.
    """
    rows = []
    for spread in spreads:
        for effect in effects:
            tested = _tested(rule, effect, spread, trials, states, smallest_effect)
            for name, level_of in rules.items():
                found = _ended(rule, level_of(rule.counts), *tested)
                rows.append(
                    {"spread": spread.name, "effect": effect, "rule": name, **_row(effect, smallest_effect, *found)}
                )
    return rows


def _tested(
    rule: SeedsUntil, effect: float, spread: Spread, trials: int, states: int, smallest_effect: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates, p of no difference and p of no equivalence, each of shape (trials, looks)."""
    values, differing, equal = (np.empty((trials, len(rule.counts))) for _ in range(3))
    for start in range(0, trials, BATCH):
        count = min(BATCH, trials - start)
        draws = generator(start, "simulated looks", spread.name, f"{effect:g}")
        grids = effect + spread.seed * draws.standard_normal((count, rule.at_most, 1))
        grids = grids + spread.state * draws.standard_normal((count, 1, states))
        grids += spread.rest * draws.standard_normal((count, rule.at_most, states))
        for look, seeds in enumerate(rule.counts):
            parts = two_way(grids[:, :seeds])
            here = slice(start, start + count), look
            values[here] = parts.mean
            differing[here] = difference_p(parts, grids[:, :seeds].mean(axis=2), FLIPS)
            equal[here] = equivalence_p(parts, smallest_effect)
    return values, differing, equal


def _ended(
    rule: SeedsUntil, levels: Sequence[float], values: np.ndarray, differing: np.ndarray, equal: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdict, number of seeds and estimate of each trial when it ends."""
    told = np.stack([words(values[:, k], differing[:, k], equal[:, k], levels[k]) for k in range(len(levels))], axis=1)
    open_ = told == "undecided"
    open_[:, -1] = False  # the last look ends it
    last = (~open_).argmax(axis=1)
    trial = np.arange(len(values))
    return told[trial, last], np.array(rule.counts)[last], values[trial, last]


def _row(
    effect: float, smallest_effect: float, verdicts: np.ndarray, seeds: np.ndarray, values: np.ndarray
) -> dict[str, Any]:
    shares = {name: float(np.mean(verdicts == name)) for name in ("better", "worse", "equivalent", "undecided")}
    wrong = shares["worse"] + (shares["better"] if effect == 0 else 0.0)
    wrong += shares["equivalent"] if effect >= smallest_effect else 0.0
    return {**shares, "wrong": wrong, "seeds": float(seeds.mean()), "value": float(values.mean())}
