"""What a comparison found, in sentences that a stranger understands: report, texts and terminal begin with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.analysis.comparison import REFERENCE, Row, headline
from pipeline.report.differences import p_text, seeds_advice
from pipeline.report.warnings import KL_DRIFT

CORRECTIONS = {
    "holm": "Holm's correction",
    "screening": "Benjamini and Hochberg's correction",
}
"""Kind of a family -> how its p values are corrected."""
ROLES = {"uniform": "its uniform counterpart", "control": "its control"}
"""Kind of a declared comparison -> what the other method is to the first."""
CLAIMS = {
    "better": "{method} is better than {against}",
    "worse": "{method} is worse than {against}",
    "equivalent": "{method} and {against} are equivalent, within ±{smallest:g}",
    "undecided": "{method} cannot be told apart from {against}: undecided",
    None: "{method} against {against}: no verdict",
}
"""Verdict -> the claim of an answer."""
NEAR = 0.05
"""Largest relative difference at which costs are called the same."""


@dataclass(frozen=True)
class Answer:
    """One declared comparison, answered."""

    verdict: str | None
    primary: bool
    claim: str
    """Who against whom, and the verdict: what is read first. No full stop."""
    evidence: str
    """The numbers behind it, and what to do where nothing is decided; whole sentences."""

    @property
    def text(self) -> str:
        """Claim and evidence."""
        return f"{self.claim}. {self.evidence}"


def answers(comparison: Mapping[str, Any]) -> list[Answer]:
    """An answer to each declared comparison, those of the primary method first."""
    return [_answer(comparison, found) for found in in_order(comparison)]


def in_order(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The declared comparisons, those of the primary method first."""
    return sorted(comparison["hypotheses"], key=lambda found: not found["primary"])


def opening(comparison: Mapping[str, Any], minutes: Mapping[tuple[str, str], float] | None = None) -> list[str]:
    """All that a text begins with, a line each: answers, who reached most, at what cost, and whether reasoning matters.

    Args:
        minutes: see ``costs_text``.
    """
    lines = [answer.text for answer in answers(comparison)] or [NOTHING_DECLARED]
    for environment in headline(comparison):
        lines += [leader_text(comparison, environment), costs_text(comparison, environment, minutes or {})]
    return [*lines, *reasoning_texts(comparison)]


NOTHING_DECLARED = "No comparison was declared (compare.uniform and compare.control are empty), so nothing was tested: what follows describes."
"""Stands where there are no answers."""


def leader_text(comparison: Mapping[str, Any], environment: str) -> str:
    """Which method reached the highest success, and how far that is above the reference policy's."""
    rows = headline(comparison)[environment]
    trained = [row for name, row in rows.items() if name != REFERENCE]
    best = max(trained, key=lambda row: row["success_mean"])  # of equals the first
    reached = (
        f"Highest success of {len(trained)} method{'s' * (len(trained) > 1)} on {environment}: {best['method']} with "
        f"{best['success_mean']:.3f}; the reference policy has {best['reference_success']:.3f}"
    )
    value, low = best["difference_to_reference"], best["difference_to_reference_ci_low"]
    if low is None:
        return f"{reached}."
    high = best["difference_to_reference_ci_high"]
    return f"{reached} ({value:+.3f}, {percent(comparison['level'])} interval {low:+.3f} to {high:+.3f})."


def costs_text(comparison: Mapping[str, Any], environment: str, minutes: Mapping[tuple[str, str], float]) -> str:
    """What one training costs: sampled tokens of every method that a declared comparison is about, and minutes if known.

    Args:
        minutes: (environment, method) -> mean minutes of a training, see ``training_minutes``.
    """
    rows = headline(comparison)[environment]
    named = [
        name
        for hypothesis in comparison["hypotheses"]
        if hypothesis["environment"] == environment
        for name in (hypothesis["method"], hypothesis["against"])
    ]
    methods = list(dict.fromkeys(named)) or [name for name in rows if name != REFERENCE]
    tokens = {name: rows[name]["training_tokens"] for name in methods if rows[name]["training_tokens"] is not None}
    spent = {name: minutes[environment, name] for name in methods if (environment, name) in minutes}
    parts = [_spent(tokens, _tokens)] if tokens else ["sampled tokens not known"]
    parts += [_spent(spent, _minutes)] if spent else []
    return f"Cost of one training on {environment}: {', '.join(parts)}."


def reasoning_texts(comparison: Mapping[str, Any]) -> list[str]:
    """What the interventions on the reference policy's reasoning have shown, a sentence per environment."""
    texts = []
    for environment, found in comparison.get("interventions", {}).items():
        own, none, other = (found["temperatures"][0][way]["success"] for way in ("own", "none", "other"))
        if found["used"]:
            texts.append(
                f"On {environment} reasoning is used by the reference policy: without it success falls from {own:.3f} to "
                f"{none:.3f}, with that of another state to {other:.3f}."
            )
        else:
            texts.append(
                f"On {environment} the reference policy's reasoning is not shown to be used (success {own:.3f} with it, "
                f"{none:.3f} without, {other:.3f} with that of another state): a result about weighting reasoning means "
                "little here."
            )
    return texts


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """What was asked, of how many comparisons, and from which size on a difference counts."""
    family = comparison["family"]
    counted = f"{family['size']} comparison{'s' * (family['size'] != 1)}"
    declared = f"{counted} declared; p values after {CORRECTIONS[family['kind']]} over all of them"
    return [
        f"Estimated is {comparison['estimand']}.",
        f"{declared}. Differences within ±{comparison['smallest_effect']:g} count as none (compare.smallest_effect).",
    ]


def efficiency_texts(comparison: Mapping[str, Any]) -> list[str]:
    """Sample efficiency of each declared comparison: beside the verdict, and without one."""
    texts = []
    for found in in_order(comparison):
        area, reached = found["efficiency"]["auc"], found["efficiency"]["tokens_to_threshold"]
        parts = []
        if area is not None:
            parts.append(f"mean validation success over the first {_tokens(area['tokens'])} {_tested(area, '+.3f')}")
        if reached is not None:
            parts.append(
                f"validation success {reached['threshold']:.3f} reached by {reached['reached']} of {reached['seeds']} "
                f"trainings, against {reached['against_reached']}"
            )
            if reached["value"] is not None:
                parts.append(f"sampled tokens until then {_tested(reached, '+.0f')}")
        if parts:
            texts.append(f"{found['method']} − {found['against']} on {found['environment']}: {'; '.join(parts)}.")
    return texts


def _tested(found: Mapping[str, Any], digits: str) -> str:
    """A difference with interval and p, where it has them."""
    value, low, high = (found[key] for key in ("value", "ci_low", "ci_high"))
    if low is None:
        return f"{value:{digits}}"
    return f"{value:{digits}} [{low:{digits}}, {high:{digits}}], {_p(found['p'])}"


def percent(level: float) -> str:
    """A level as it is written: 95 %, 98.8 %."""
    return f"{100 * level:.3g} %"


def _answer(comparison: Mapping[str, Any], found: Mapping[str, Any]) -> Answer:
    rows, verdict = headline(comparison)[found["environment"]], found["verdict"]
    own, other = rows[found["method"]], rows[found["against"]]
    claim = CLAIMS[verdict].format(
        method=found["method"],
        against=f"{found['against']} ({_role(found['kind'], other)})",
        smallest=found["smallest_effect"],
    )
    numbers = (
        f"Success {own['success_mean']:.3f} against {other['success_mean']:.3f}, a difference of {found['value']:+.3f} "
        f"({'; '.join(_evidence(comparison, found))})."
    )
    return Answer(
        verdict,
        found["primary"],
        f"On {found['environment']}, {claim}",
        " ".join([numbers, *_advice(comparison, found)]),
    )


def _evidence(comparison: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What stands in brackets: interval or range, p value, seeds."""
    seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
    if found["ci_low"] is None:
        low, high = min(found["by_seed"]), max(found["by_seed"])
        return [seeds] if found["seeds"] == 1 else [f"over single seeds {low:+.3f} to {high:+.3f}", seeds]
    parts = [f"{percent(found['level'])} interval {found['ci_low']:+.3f} to {found['ci_high']:+.3f}"]
    if found["verdict"] == "equivalent" and found["p_equivalence"] is not None:
        parts.append(f"{_p(found['p_equivalence'])} that it is larger than ±{found['smallest_effect']:g}")
    elif found["p_adjusted"] is not None:
        size = comparison["family"]["size"]
        parts.append(_p(found["p_adjusted"]) + (f", corrected for {size} comparisons" if size > 1 else ""))
    return [*parts, seeds]


def _advice(comparison: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What a run without a decision could have seen, and what would decide."""
    family = comparison["family"]
    if found["verdict"] is None:
        if found["seeds"] >= family["least_seeds"]:
            return ["A number is missing or not finite."]
        if "look" in comparison:  # which says what comes next
            return []
        advice = seeds_advice(family["size"], family["kind"])
        return [f"{advice[0].upper()}{advice[1:]}."]
    if found["verdict"] != "undecided":
        return []
    parts = []
    if found["detectable"] is not None:
        parts.append(f"this run could have seen a difference of {found['detectable']:.2f} with 80 % power")
    if found["seeds_needed"] is not None and found["seeds_needed"] > found["seeds"]:
        parts.append(f"about {found['seeds_needed']} seeds would decide it")
    elif found["states_needed"] is not None:
        parts.append(f"about {found['states_needed']} test states would decide it, more seeds alone would not")
    text = "; ".join(parts)
    return [f"{text[0].upper()}{text[1:]}."] if text else []


def _role(kind: str, other: Row) -> str:
    """What the other method is to the first one; of a control also how near its updates are."""
    matched = other.get("matched")
    if kind != "control" or matched is None:
        return ROLES[kind]
    off = percent(round(abs(matched["off"]), 3))
    if abs(matched["off"]) > KL_DRIFT:
        return f"its control, which is not matched: {off} off in how far an update moves action tokens"
    return f"its matched control: moves action tokens as far per update, within {off}"


def _p(value: float) -> str:
    written = p_text(value)
    return f"p < {written[1:]}" if written.startswith("<") else f"p = {written}"


def _spent(values: Mapping[str, float], write: Any) -> str:
    """Values by method in words: one where they are nearly the same, each where they are few, the range of many."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[high] - values[low] <= NEAR * values[high] or write(values[low]) == write(values[high]):
        return str(write(values[high])) + (" each" if len(values) > 1 else "")
    if len(values) > 4:
        return f"from {write(values[low])} ({low}) to {write(values[high])} ({high})"
    return ", ".join(f"{write(value)} ({name})" for name, value in values.items())


def _tokens(count: float) -> str:
    million = count >= 1e6
    return f"{count / 1e6:.2f} million sampled tokens" if million else f"{count / 1e3:.0f} thousand sampled tokens"


def _minutes(count: float) -> str:
    spent = f"{count:.1f} minutes" if count >= 1 else f"{60 * count:.0f} seconds"
    return f"{spent} of wall clock"
