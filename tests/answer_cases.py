"""Declared comparisons as comparison.json has them, made up for tests of what is said of them."""

from __future__ import annotations

from typing import Any


def hypothesis(verdict: str | None = "better", **changes: Any) -> dict[str, Any]:
    """grpo_actfocus against grpo on lake over ten seeds; with None as verdict a single seed."""
    value = {"better": 0.08, "worse": -0.08, "equivalent": 0.004, "undecided": 0.03, None: 0.03}[verdict]
    seeds = 10 if verdict else 1
    tested = verdict is not None
    made = {
        "environment": "lake",
        "method": "grpo_actfocus",
        "against": "grpo",
        "kind": "uniform",
        "primary": True,
        "value": value,
        "ci_low": value - 0.05 if tested else None,
        "ci_high": value + 0.04 if tested else None,
        "level": 0.95,
        "by_seed": [value + 0.01 * (seed - 4.5) for seed in range(seeds)] if tested else [value],
        "seeds": seeds,
        "p": 0.001 if tested else None,
        "p_adjusted": 0.004 if tested else None,
        "p_equivalence": 0.012 if tested else None,
        "verdict": verdict,
        "detectable": 0.06 if tested else None,
        "seeds_needed": 24 if verdict == "undecided" else None,
        "states_needed": None,
        "smallest_effect": 0.05,
        "efficiency": {"auc": None, "tokens_to_threshold": None},
    }
    return {**made, **changes}


def answered(comparison: dict[str, Any], *declared: dict[str, Any], size: int | None = None) -> dict[str, Any]:
    """The comparison with these declared comparisons, as a family of their number or of ``size``."""
    return {
        **comparison,
        "hypotheses": list(declared),
        "family": {"kind": "holm", "size": size or len(declared), "alpha": 0.05, "least_seeds": 6},
    }
