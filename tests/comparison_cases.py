"""Made-up evaluations and curves for tests of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.analysis.comparison import REFERENCE, Inputs, compare
from pipeline.report.warnings import comparison_warnings
from pipeline.settings.params import Config, parse
from pipeline.workspace.randomness import generator
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]


ITERATIONS = 12


RATES = {"grpo": 0.4, "grpo_actfocus": 0.8, "grpo_lr_matched": 0.5, REFERENCE: 0.3}


def configuration(**changes: Any) -> Config:
    raw = read_yaml(ROOT / "params.yaml")
    environment = next(iter(raw["environments"].values()))
    methods = {
        "grpo": {},
        "grpo_actfocus": {"weight": {"kind": "actfocus"}},
        "grpo_lr_matched": {"learning_rate": 3e-7},
    }
    return parse(
        raw
        | {
            "comparison": "toy",
            "seeds": [0, 1, 2, 3],
            "environments": {"lake": environment},
            "methods": methods,
            "evaluation": {"states": 8, "rollouts": 3, "temperatures": [0.5, 1.0]},
            "compare": {
                "uniform": {"grpo_actfocus": "grpo"},
                "control": {"grpo_actfocus": "grpo_lr_matched"},
            },
        }
        | changes
    )


def episodes(config: Config, method: str, rate: float) -> pa.Table:
    """Each temperature above the first costs 0.1 of the rate; turns, tokens and ends are the same for every episode."""
    plan, columns = config.evaluation, []
    for seed in config.seeds:
        for place, temperature in enumerate(plan.temperatures):
            won = generator(seed, "toy", method).random((plan.states, plan.rollouts)) < rate - 0.1 * place
            columns += [
                (seed, temperature, f"state {s}", r, bool(won[s, r])) for s, r in np.ndindex(plan.states, plan.rollouts)
            ]
    names = ("seed", "temperature", "state", "rollout", "success")
    table = dict(zip(names, map(list, zip(*columns, strict=True)), strict=True))
    count = len(columns)
    return pa.table(
        {
            "environment": ["lake"] * count,
            "method": [method] * count,
            **table,
            "return": [0.5 if won else -0.5 for won in table["success"]],
            "end_reason": ["goal" if won else "turns" for won in table["success"]],
            "turns": [4] * count,
            "valid_turns": [3] * count,
            "disallowed_turns": [0] * count,
            "malformed_turns": [0] * count,
            "cut_turns": [1] * count,
            "tokens": [50] * count,
            "action_tokens": [5] * count,
        }
    )


def curve(seed: int, rate: float, kl: float) -> list[dict[str, float]]:
    noise = generator(seed, "toy curve", f"{rate:g}")
    rows: list[dict[str, float]] = []
    for number in range(ITERATIONS):
        done = (number + 1) / ITERATIONS
        row = {
            "iteration": float(number),
            "success": 0.3 + (rate - 0.3) * done + noise.normal(0, 0.04),
            "entropy_action": 1.2 - 0.8 * done * rate + noise.normal(0, 0.03),
            "entropy_reasoning": 0.9 - 0.2 * done + noise.normal(0, 0.03),
            "kl_reference": 0.05 * done * rate,
            "clip_fraction": 0.02 + 0.05 * rate * done,
            "gradient_norm": 1 + noise.random(),
            "gradient_share_action": rate / 2,
            "kl_update_action": kl * (1.0 + number),
            "non_finite_losses": 0.0,
            "episodes": 128.0,
            "tokens": 4000.0 + 10 * seed,
        }
        if number % 4 == 0:
            row["measured_gradient_share_action"] = rate / 4
        if number == 0:
            row["validation_success_before"] = 0.3
        if number % 4 == 3:
            row["validation_success"] = row["success"] + 0.02
        rows.append(row)
    return rows


def inputs(config: Config, control_kl: float = 0.0105) -> Inputs:
    kl = {"grpo": 0.002, "grpo_actfocus": 0.01, "grpo_lr_matched": control_kl}
    rates = {method: RATES.get(method, 0.6) for method in config.methods}
    curves = {
        ("lake", m): {str(seed): curve(seed, rate, kl.get(m, 0.01)) for seed in config.seeds}
        for m, rate in rates.items()
    }
    timings = {
        key: {seed: [{"seconds": 2.0 * (i + 1)} for i in range(ITERATIONS)] for seed in rows}
        for key, rows in curves.items()
    }
    played = {("lake", m): episodes(config, m, rate) for m, rate in [*rates.items(), (REFERENCE, RATES[REFERENCE])]}
    return Inputs(played, curves, timings)


def compared(config: Config, made: Inputs) -> dict[str, Any]:
    """The comparison as the stage writes it."""
    found = compare(config, made)
    return {**found, "warnings": comparison_warnings(config, made.curves, found)}


def row_of(comparison: dict[str, Any], method: str, temperature: float = 0.5) -> dict[str, Any]:
    (row,) = [r for r in comparison["rows"] if r["method"] == method and r["temperature"] == temperature]
    return dict(row)
