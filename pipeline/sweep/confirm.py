"""Is the best of a sweep any better? A comparison of it with the baselines on seeds that the sweep never saw.

The best of many noisy scores is flattered by having been picked. So it is trained again, beside the baselines, on fresh
seeds, and evaluated on test states: an ordinary comparison, with its own params file and the same pipeline.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.analysis.comparison import difference_of, rows_at
from pipeline.analysis.verdicts import Difference
from pipeline.report.differences import difference_text, seeds_advice
from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.settings.sweep import Value
from pipeline.sweep.plan import SearchPlan
from pipeline.workspace.errors import UserError

BEST = "best"
"""Name of the best settings where only one method was searched."""


def confirmation(
    plans: Sequence[SearchPlan], searches: Sequence[Mapping[str, Any]], out: str, root: str
) -> dict[str, Any]:
    """A params file that compares each search's best with its baselines.

    Of a single search the methods are called by the baselines' names and ``best``; of several, a method at its best keeps
    its name, and ``<method>_<baseline>`` is the method at a baseline. The best is paired with the first baseline
    (``control``) and with the last one or, of several searches, with its uniform counterpart (``uniform``). These are the
    declared comparisons, one family.

    Args:
        plans: the searches.
        searches: their outcomes, as ``summary.json`` has them.
        out: folder of the comparison under the root.
        root: path from that folder to the root.

    Raises:
        UserError: a search has no best, or has been run with other settings than these.
    """
    first = plans[0]
    methods: dict[str, Any] = {}
    control: dict[str, str] = {}
    outcomes = _matched(plans, searches)
    for plan, outcome in zip(plans, outcomes, strict=True):
        baselines = {
            name if len(plans) == 1 else f"{plan.method}_{name}": point for name, point in plan.baselines.items()
        }
        best = BEST if len(plans) == 1 else plan.method
        taken = {best, *methods} & set(baselines)
        if taken:
            raise UserError(f"sweep {plan.study}: {min(taken)!r} would name two methods; rename that baseline")
        for name, point in {**baselines, best: outcome["best"]["settings"]}.items():
            methods[name] = _method(plan, point)
        control[best] = next(iter(baselines))

    raw = copy.deepcopy(dict(first.raw))
    raw.pop("sweep", None)
    shared = {key: point for key, point in _shared(plans, outcomes).items() if point}
    raw = dict(overlay(raw, shared))
    sweep = first.config.sweep
    raw |= {
        "root": root,
        "out": out,
        "params_file": f"{out}/params.yaml",
        "comparison": f"{first.config.comparison}_confirm_{first.study}",
        "seeds": list(sweep.confirm_seeds),
        "methods": methods,
        "compare": {**raw.get("compare", {}), **_declared(plans, list(methods), control)},
        # Only the slices that are the trainings' first iterations; the diagnostics are params.yaml's own.
        "bottleneck": {"groups": first.config.rollout.groups * len(sweep.confirm_seeds), "resamples": 100},
    }
    parse(raw, f"{out}/params.yaml")
    return raw


def _declared(plans: Sequence[SearchPlan], methods: Sequence[str], control: Mapping[str, str]) -> dict[str, Any]:
    """Which comparisons there will be verdicts on: of each best, and no baseline with another."""
    uniform = {k: v for k, v in plans[0].config.compare.uniform.items() if len(plans) > 1 and {k, v} <= set(methods)}
    if len(plans) == 1 and len(methods) > 2:
        uniform = {BEST: methods[-2]}
    return {"uniform": uniform, "control": dict(control), "primary": next(iter(control)), "family": "holm"}


def confirmation_text(comparison: Mapping[str, Any]) -> str:
    """One line per search and what its best is paired with: do the two differ on fresh seeds?"""
    lines = []
    for environment in dict.fromkeys(row["environment"] for row in comparison["rows"]):
        temperature = next(row["temperature"] for row in comparison["rows"] if row["headline"])
        for row in rows_at(comparison, environment, temperature):
            for kind in ("control", "uniform"):
                found = difference_of(row, kind)
                if row["control"] is not None and found is not None:
                    where = f"{row['states']} test states at temperature {temperature:g}"
                    lines.append(_line(row, row[kind], found, where, comparison["family"]["size"]))
    return "\n".join(lines)


def _line(row: Mapping[str, Any], other: str, difference: Difference, where: str, family: int) -> str:
    seeds = len(difference.by_seed)
    line = (
        f"{row['environment']}: {row['method']} ({row['success_mean']:.3f}) − {other}, {seeds} fresh "
        f"seed{'s' * (seeds > 1)} and {where}: {difference_text(difference)}"
    )
    return line if difference.verdict is not None else f"{line}; {seeds_advice(family, key='sweep.confirm_seeds')}"


def _matched(plans: Sequence[SearchPlan], searches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The outcome of each plan, in the plans' order."""
    by_name = {outcome["name"]: outcome for outcome in searches}
    found = []
    for plan in plans:
        outcome = by_name.get(plan.name)
        if outcome is None:
            raise UserError(
                f"sweep {plan.study}: {plan.method} has not been searched with these settings; run `make sweep` again"
            )
        if outcome["best"] is None:
            raise UserError(f"sweep {plan.study}: no trial of {plan.method} kept all constraints, nothing to confirm")
        found.append(outcome)
    return found


def _method(plan: SearchPlan, point: Mapping[str, Value]) -> dict[str, Any]:
    """The method's own slots at a point of the space, its settings elsewhere left out."""
    own = dict(plan.raw["methods"][plan.method] or {})
    return dict(overlay(own, plan.overlay(point).get("methods", {}).get(plan.method, {})))


def _shared(plans: Sequence[SearchPlan], outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of a search outside methods: all of a comparison's methods share them.

    Raises:
        UserError: there are some, and they differ between what is compared.
    """
    found: list[dict[str, Any]] = []
    for plan, outcome in zip(plans, outcomes, strict=True):
        for point in (*plan.baselines.values(), outcome["best"]["settings"]):
            changed = plan.overlay(point)
            changed.pop("methods", None)
            found.append(changed)
    if any(other != found[0] for other in found[1:]):
        raise UserError(
            f"sweep {plans[0].study}: its best and baselines differ in settings outside methods, which one comparison "
            "shares; use best.yaml as a preset's overlay and compare two runs (make compare)"
        )
    return found[0]
