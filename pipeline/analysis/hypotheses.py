"""The declared comparisons of a params file: its hypotheses, judged together as one family.

Every pair of ``compare.uniform`` and ``compare.control`` in every environment, at the headline temperature, is one. The
reference policy and other temperatures are not declared: their differences have intervals and no verdict.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.analysis.intervals import LEVEL
from pipeline.analysis.power import least_seeds
from pipeline.analysis.scores import Scores, of_seeds, paired_grid, rounded, significant
from pipeline.analysis.verdicts import ALPHA, Difference, judge
from pipeline.settings.params import Compare, Config

Counterpart = Literal["uniform", "control"]
"""What the other method is to the first."""

ESTIMAND = (
    "the mean difference in success on held-out initial states at the final step, at the headline temperature, between "
    "trainings with new seeds, at an equal budget"
)
"""What every verdict is about."""


@dataclass(frozen=True)
class Hypothesis:
    """One declared comparison: does this method differ from that one?"""

    environment: str
    method: str
    against: str
    kind: Counterpart
    primary: bool
    """Of the method that ``compare.primary`` names."""


def declared(config: Config) -> list[Hypothesis]:
    """All of a params file, the primary method's first, each method's uniform counterpart before its control."""
    pairs = {"uniform": config.compare.uniform, "control": config.compare.control}
    methods = list(dict.fromkeys([*pairs["uniform"], *pairs["control"]]))
    primary = config.compare.primary or next(iter(methods), None)
    kinds: tuple[Counterpart, ...] = ("uniform", "control")
    found = [
        Hypothesis(environment, method, pairs[kind][method], kind, method == primary)
        for environment in config.environments
        for method in methods
        for kind in kinds
        if method in pairs[kind]
    ]
    return sorted(found, key=lambda hypothesis: not hypothesis.primary)


def judged(
    config: Config, scores: Mapping[tuple[str, str], Scores], alpha: float = ALPHA
) -> dict[Hypothesis, Difference]:
    """The verdicts of all hypotheses, from the headline scores of (environment, method).

    Raises:
        ValueError: two methods share no seed or no state.
    """
    family = declared(config)
    scores = without_excluded(config, scores)
    grids = [paired_grid(*(scores[one.environment, name] for name in (one.method, one.against))) for one in family]
    plan = config.compare
    return dict(zip(family, judge(grids, plan.family, plan.smallest_effect, alpha), strict=True))


def without_excluded(config: Config, scores: Mapping[tuple[str, str], Scores]) -> dict[tuple[str, str], Scores]:
    """Scores of (environment, method) without the seeds of ``compare.exclusions``."""
    left_out = {(one.environment, one.method, one.seed) for one in config.compare.exclusions}
    return {key: of_seeds(one, [s for s in one.seeds if (*key, s) not in left_out]) for key, one in scores.items()}


def family_entry(compare: Compare, size: int) -> dict[str, Any]:
    """The family as comparison.json has it; ``least_seeds`` is how many paired seeds a verdict takes, null without any."""
    return {
        "kind": compare.family,
        "size": size,
        "alpha": ALPHA,
        "least_seeds": least_seeds(size, ALPHA, compare.family) if size else None,
    }


def entry(
    hypothesis: Hypothesis,
    difference: Difference,
    smallest_effect: float,
    efficiency: Mapping[str, Any],
    alarmed: Mapping[str, list[str]],
) -> dict[str, Any]:
    """A hypothesis as comparison.json has it; ``seeds`` is how many are paired.

    Differences in success have 6 digits, p values 6 significant ones. ``efficiency`` is from ``efficiency.compared``,
    ``alarmed`` from ``alarmed.alarmed``, and left out where it is empty.
    """
    low, high = difference.interval or (None, None)
    return {
        "environment": hypothesis.environment,
        "method": hypothesis.method,
        "against": hypothesis.against,
        "kind": hypothesis.kind,
        "primary": hypothesis.primary,
        "value": rounded(difference.value),
        "ci_low": rounded(low),
        "ci_high": rounded(high),
        "level": LEVEL,
        "by_seed": [rounded(value) for value in difference.by_seed],
        "seeds": len(difference.by_seed),
        "p": significant(difference.p),
        "p_adjusted": significant(difference.p_adjusted),
        "p_equivalence": significant(difference.p_equivalence),
        "verdict": difference.verdict,
        "detectable": rounded(difference.detectable),
        "seeds_needed": difference.seeds_needed,
        "states_needed": difference.states_needed,
        "smallest_effect": smallest_effect,
        "efficiency": dict(efficiency),
        **({"alarmed": dict(alarmed)} if alarmed else {}),
    }
