"""The checklist for credit-assignment claims, filled from the run: the survey's (arXiv 2604.09459) fourteen items, and ours.

Where the run does not tell, it says so: ``not known`` is what a reader has to ask about.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
from safetensors import safe_open

from pipeline.analysis.comparison import REFERENCE, Inputs, Row, headline
from pipeline.analysis.timings import training_minutes
from pipeline.report.declared import exclusion_lines
from pipeline.report.tables import Table
from pipeline.settings.method import Method
from pipeline.settings.params import Config

UNKNOWN = "not known"
ELSEWHERE = "in reports/index.html (times differ between equal runs)"
"""Instead of wall-clock, where equal runs are to be equal bytes."""

CREDIT = {
    "group": ("episode", "Monte Carlo, within groups"),
    "token_group": ("token", "Monte Carlo, within groups"),
    "step_group": ("turn", "Monte Carlo, within groups of equal states"),
    "gated_progress": ("token", "Monte Carlo, within groups"),
    "gae": ("token", "temporal difference"),
    "turn_gae": ("turn", "temporal difference"),
    "bilevel_gae": ("turn and token", "temporal difference"),
    "entropy_gae": ("token", "temporal difference"),
    "soft_q": ("token", "temporal difference"),
    "shared_prefix": ("segment", "Monte Carlo, over branches"),
    "prefix_credit": ("segment", "Monte Carlo, over branches"),
    "siblings": ("segment", "Monte Carlo, over branches"),
    "reinforced": ("segment", "Monte Carlo, over branches"),
}
"""Kind of an advantage -> the granularity of its credit, and the survey's family."""


def checklist_tables(
    config: Config, comparison: Mapping[str, Any], inputs: Inputs, parameters: int | None, timed: bool
) -> list[Table]:
    """The checklist, then what differs between methods, a table per environment.

    Args:
        parameters: of the policy, see ``policy_size``.
        timed: write wall-clock; without it equal runs have equal tables.
    """
    tables = [Table("Checklist", ["item", "in this run"], _items(config, comparison, inputs, parameters, timed))]
    minutes = training_minutes(inputs.timings)
    for environment, rows in headline(comparison).items():
        header = ["method", "credit", "learning rate", "chosen", "success, sd over seeds", "seeds", "sampled tokens"]
        cells = [
            [
                name,
                _credit(config.methods[name]),
                f"{row['learning_rate']:g}" if row["learning_rate"] is not None else UNKNOWN,
                _chosen(row),
                _spread(row),
                str(row["seeds"]),
                f"{row['training_tokens']:.0f}" if row["training_tokens"] is not None else UNKNOWN,
                *([_hours(minutes.get((environment, name)))] if timed else []),
            ]
            for name, row in rows.items()
            if name != REFERENCE
        ]
        tables.append(
            Table(
                f"Checklist, methods on {environment}",
                [*header, *(["hours of a training"] if timed else [])],
                cells,
            )
        )
    return tables


def policy_size(folder: Path) -> int | None:
    """Number of parameters of a saved policy, from the heads of its weight files; None if there are none."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        return None
    total = 0
    for file in files:
        with safe_open(file, framework="np") as weights:
            total += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    return total


def _items(
    config: Config, comparison: Mapping[str, Any], inputs: Inputs, parameters: int | None, timed: bool
) -> list[list[str]]:
    """Item and answer; ``(r)`` marks what the survey recommends and does not require."""
    plan, uniform, control = config.evaluation, config.compare.uniform, config.compare.control
    pairs = "; ".join(f"{method}: {other}" for method, other in uniform.items())
    controls = "; ".join(f"{method}: {other}" for method, other in control.items())
    return [
        ["Base model", _base(config, parameters)],
        ["Training data and filters", _data(config)],
        ["Granularity and family of credit", "of each method, below"],
        ["Episode-level baseline on the same model", _baselines(config)],
        ["Compute of the compared methods", _compute(config, comparison)],
        ["Ablation of the credit alone (r)", pairs or "none: compare.uniform is empty"],
        ["Controls of step size", controls or "none: compare.control is empty"],
        ["Benchmarks and splits", _splits(config)],
        ["Metric", f"{comparison['estimand']} Temperature {plan.temperatures[0]:g}."],
        ["Spread (r)", "standard deviation over seeds, of each method, below"],
        ["Seeds", _trained(inputs)],
        ["CPU hours", "of a training on one thread, in the last column below" if timed else ELSEWHERE],
        ["GPU hours", "not measured; where a GPU was used, hours are wall-clock with it"],
        ["Extra cost of credit (r)", _extra(config)],
        ["Mean length of an episode", _lengths(inputs, plan.temperatures[0], spread=False)],
        ["Shortest, median and longest (r)", _lengths(inputs, plan.temperatures[0], spread=True)],
        ["Exclusions", _exclusions(comparison)],
        ["Is reasoning used", _reasoning(comparison)],
    ]


def _base(config: Config, parameters: int | None) -> str:
    policy = config.policy
    size = f"{parameters} parameters" if parameters is not None else f"size {UNKNOWN}"
    if policy.kind == "pretrained":
        return f"{policy.model}, {size}, revision {policy.revision or UNKNOWN}"
    return f"made from scratch by this project, Qwen2 architecture, {size}, seed {policy.seed}"


def _data(config: Config) -> str:
    """What the base model has learnt from, what it was trained on here, and what was left out."""
    policy, sizes = config.policy, config.rollout
    filters = dict.fromkeys(method.filter.kind for method in config.methods.values())
    learnt = [] if policy.kind == "scratch" else [f"data of the base model: {UNKNOWN}"]
    if (shown := policy.demonstrations) is not None:
        episodes = [min(shown.episodes, phase.steps * shown.batch_episodes) for phase in shown.phases]
        learnt.append(f"{sum(episodes)} demonstrated episodes of {', '.join(config.environments)}")
    return (
        f"{'; then '.join(learnt)}; then episodes of its own, {sizes.groups} initial states × {sizes.group_size} in an iteration; "
        f"filters of groups: {', '.join(filters)}"
    )


def _credit(method: Method) -> str:
    """Granularity and family of the advantage, and the weight that is laid over it."""
    granularity, family = CREDIT.get(method.advantage.kind, (UNKNOWN, UNKNOWN))
    weight = "" if method.weight.kind == "uniform" else f"; weights {method.weight.kind} per token"
    return f"{granularity}, {family} (advantage {method.advantage.kind}){weight}"


def _baselines(config: Config) -> str:
    """Methods whose credit is the same for every token of an episode."""
    found = [
        name
        for name, method in config.methods.items()
        if method.advantage.kind == "group" and method.weight.kind == "uniform" and method.reward.kind == "none"
    ]
    return ", ".join(found) or "none"


def _compute(config: Config, comparison: Mapping[str, Any]) -> str:
    if config.train.tokens is not None:
        return f"equal: every training ends at {config.train.tokens} sampled tokens"
    spent = [row["training_tokens"] for row in comparison["rows"] if row["training_tokens"]]
    apart = f", sampled tokens from {min(spent):.0f} to {max(spent):.0f}" if spent else f", sampled tokens {UNKNOWN}"
    return f"equal iterations ({config.train.iterations}){apart}"


def _splits(config: Config) -> str:
    plan = config.evaluation
    names = ", ".join(f"{name} ({section.id})" for name, section in config.environments.items())
    return (
        f"{names}; {plan.states} test states × {plan.rollouts} episodes, {plan.validation_states} validation states, "
        "both apart from training states"
    )


def _trained(inputs: Inputs) -> str:
    """The seeds of all trainings, and those that only some methods have."""
    seeds = [set(map(int, curves)) for curves in inputs.curves.values()]
    common = set.intersection(*seeds)
    more = set.union(*seeds) - common
    return ", ".join(map(str, sorted(common))) + (
        f"; of some methods {', '.join(map(str, sorted(more)))}" if more else ""
    )


def _extra(config: Config) -> str:
    """What methods do beside sampling and updating."""
    parts = []
    for name, method in config.methods.items():
        costs = [f"branches ({method.branching.kind})"] if method.branching.kind != "none" else []
        costs += ["a critic"] if getattr(method.advantage, "critic", None) is not None else []
        signal = getattr(method.weight, "signal", None)
        costs += [f"the signal {signal} of every sampled token"] if signal else []
        parts += [f"{name}: {', '.join(costs)}"] if costs else []
    return "; ".join(parts) or "none"


def _lengths(inputs: Inputs, temperature: float, spread: bool) -> str:
    """Tokens of evaluated episodes, over all methods of an environment."""
    parts = []
    for environment in dict.fromkeys(place for place, _ in inputs.episodes):
        tables = [table for (place, _), table in inputs.episodes.items() if place == environment]
        columns = [
            np.array(t["tokens"].to_pylist())[np.array(t["temperature"].to_pylist()) == temperature] for t in tables
        ]
        tokens = np.concatenate(columns)
        shown = (
            f"{np.min(tokens):.0f}, {np.median(tokens):.0f}, {np.max(tokens):.0f}"
            if spread
            else f"{np.mean(tokens):.1f}"
        )
        parts.append(f"{environment} {shown} tokens")
    return "; ".join(parts)


def _exclusions(comparison: Mapping[str, Any]) -> str:
    return " ".join(exclusion_lines(comparison)) or "none: no training was left out"


def _reasoning(comparison: Mapping[str, Any]) -> str:
    """What the interventions said, by environment."""
    found = comparison.get("interventions", {})
    environments = headline(comparison)
    return "; ".join(
        f"{name}: {UNKNOWN}" if name not in found else f"{name}: {'yes' if found[name]['used'] else 'no'}"
        for name in environments
    )


def _chosen(row: Row) -> str:
    """How the learning rate was chosen."""
    matched = row.get("matched")
    if matched is None:
        return "given"
    return f"matched to {matched['matched_to']}, off by {abs(matched['off']):.1%}"


def _spread(row: Row) -> str:
    seeds = row["seed_success"]
    return (
        f"{row['success_mean']:.3f}, {stdev(seeds):.3f}" if len(seeds) > 1 else f"{row['success_mean']:.3f}, {UNKNOWN}"
    )


def _hours(minutes: float | None) -> str:
    return UNKNOWN if minutes is None else f"{minutes / 60:.3g}"
