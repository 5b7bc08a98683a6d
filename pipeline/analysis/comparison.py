"""The comparison of all methods: one row per environment, method and temperature."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.analysis import statistics
from pipeline.analysis.statistics import Difference, Interval
from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import CUT_OFF, RESPONSES
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.randomness import generator

REFERENCE = "reference"
"""What the reference policy is called where methods have their names."""
SPENT = ("training_episodes", "training_tokens", "paths_per_state")
"""Keys of a row, of one training as means over seeds: episodes, sampled tokens, and episodes per initial state."""
SHARE = "measured_gradient_share_action"
"""Metric of the curves: the action tokens' share of the gradient, from per-token gradients."""

Row = Mapping[str, Any]

Curves = Mapping[str, list[dict[str, float]]]
"""Seed -> one row per iteration."""


@dataclass(frozen=True)
class Inputs:
    """What the comparison reads; keys are (environment, method)."""

    episodes: Mapping[tuple[str, str], pa.Table]
    """Per-episode results of all seeds and temperatures, the reference policy's among them."""
    curves: Mapping[tuple[str, str], Curves]
    timings: Mapping[tuple[str, str], Curves]
    """Wall-clock: cumulative ``seconds``; a method may be absent."""


def read_inputs(config: Config, layout: Layout) -> Inputs:
    """Read evaluations, curves and, where they exist, timings.

    Raises:
        UserError: an evaluation or a curve is missing, or a file is not JSON.
    """
    trained = list(product(config.environments, config.methods))
    played = [*trained, *((environment, REFERENCE) for environment in config.environments)]
    needed = [layout.evaluations(*key) for key in played] + [layout.curves(*key) for key in trained]
    if missing := [file for file in needed if not file.exists()]:
        raise UserError("\n".join(f"{file}: no such file; `dvc repro` makes it" for file in missing))
    return Inputs(
        {key: pq.read_table(layout.evaluations(*key)) for key in played},
        {key: read_json(layout.curves(*key))["seeds"] for key in trained},
        read_timings(config, layout),
    )


def read_timings(config: Config, layout: Layout) -> dict[tuple[str, str], Curves]:
    """(environment, method) -> wall-clock of its trainings, of those that are there.

    Raises:
        UserError: a file is not JSON.
    """
    trained = product(config.environments, config.methods)
    return {key: read_json(layout.timings(*key))["seeds"] for key in trained if layout.timings(*key).exists()}


def compare(config: Config, inputs: Inputs) -> dict[str, Any]:
    """All rows, ready to be written as JSON: no NaN, and the same for the same inputs.

    Rates are in [0, 1]. Measured numbers are rounded to 6 digits (KL per iteration: 6 significant ones), settings are as
    in params.yaml, and what does not apply is null. ``difference_to_*`` is paired over common seeds and states, and has an
    interval (``_ci_low``, ``_ci_high``) from ``VERDICT_SEEDS`` paired seeds on, which is its verdict.
    ``probability_of_improvement`` is over the uniform counterpart. The reference policy has rows of its own. ``tokens`` is
    the budget of every training, if there is one; ``iterations`` and ``SPENT`` are what it took.

    Raises:
        ValueError: an evaluation is unbalanced or lacks a temperature, or two of them share no seed or state.
    """
    grid = product(config.environments, config.evaluation.temperatures)
    return {
        "schema": 2,
        "comparison": config.comparison,
        "resamples": config.compare.resamples,
        "tokens": config.train.tokens,
        "rows": [row for place in grid for row in _rows(config, inputs, *place)],
    }


def places(comparison: Mapping[str, Any]) -> dict[str, list[float]]:
    """The temperatures of each environment, the headline first."""
    found: dict[str, list[float]] = {}
    for row in comparison["rows"]:
        temperatures = found.setdefault(row["environment"], [])
        if row["temperature"] not in temperatures:
            temperatures.append(row["temperature"])
    return found


def rows_at(comparison: Mapping[str, Any], environment: str, temperature: float) -> list[Row]:
    """The rows of one environment and temperature, the reference policy last."""
    return [r for r in comparison["rows"] if r["environment"] == environment and r["temperature"] == temperature]


def headline(comparison: Mapping[str, Any]) -> dict[str, dict[str, Row]]:
    """Environment -> method -> its row at the headline temperature."""
    found: dict[str, dict[str, Row]] = {}
    for row in comparison["rows"]:
        if row["headline"]:
            found.setdefault(row["environment"], {})[row["method"]] = row
    return found


def difference_of(row: Mapping[str, Any], other: str) -> Difference | None:
    """The difference of a comparison's row to ``reference``, ``uniform`` or ``control``, None if it has none."""
    name = f"difference_to_{other}"
    value, low, high = (row[f"{name}{part}"] for part in ("", "_ci_low", "_ci_high"))
    if value is None:
        return None
    return Difference(value, None if low is None else Interval(low, high), tuple(row[f"{name}_by_seed"]))


def _rows(config: Config, inputs: Inputs, environment: str, temperature: float) -> list[dict[str, Any]]:
    methods = [*config.methods, REFERENCE]
    tables = {method: inputs.episodes[environment, method] for method in methods}
    scores = {method: statistics.balanced_scores(table, temperature) for method, table in tables.items()}

    def draws() -> np.random.Generator:
        # The same draws for every method: differences between intervals are not differences between resamples.
        return generator(0, "compare", environment, f"{temperature:g}")

    resamples = config.compare.resamples
    reference = statistics.bootstrap_interval(scores[REFERENCE].success, resamples, draws())
    rows = []
    for method in methods:
        own = scores[method]
        uniform, control = config.compare.uniform.get(method), config.compare.control.get(method)
        others = {"uniform": uniform, "control": control, "reference": None if method == REFERENCE else REFERENCE}
        differences = {k: statistics.paired_difference(own, scores[other]) for k, other in others.items() if other}
        improvement = None if uniform is None else statistics.probability_of_improvement(own, scores[uniform])
        seed_means = own.success.mean(axis=(1, 2))
        t_interval = statistics.t_interval(own.success)
        # It knows nothing of a rate's range: the part outside [0, 1] is cut off.
        within = None if t_interval is None else Interval(*np.clip(t_interval, 0.0, 1.0))
        rows.append(
            {
                "environment": environment,
                "method": method,
                "temperature": temperature,
                "headline": temperature == config.evaluation.temperatures[0],
                "seeds": len(own.seeds),
                "states": len(own.states),
                "episodes": own.success.size,
                "success_mean": _round(own.success.mean()),
                "success_iqm": _round(statistics.interquartile_mean(own.success)),
                **_bounds("success_ci", statistics.bootstrap_interval(own.success, resamples, draws())),
                **_bounds("t_ci", within),
                "seed_success": [_round(mean) for mean in seed_means],
                "reference_success": _round(scores[REFERENCE].success.mean()),
                **_bounds("reference_ci", reference),
                "uniform": uniform,
                "control": control,
                **{key: value for k in others for key, value in _compared(k, differences.get(k)).items()},
                "probability_of_improvement": _round(improvement),
                "collapsed_seeds": None if method == REFERENCE else int((seed_means < reference.low).sum()),
                **_behaviour(
                    tables[method].filter(pc.equal(tables[method]["temperature"], temperature)),
                    config.environments[environment].format_penalty,
                ),
                **_training(config, method, inputs.curves.get((environment, method))),
            }
        )
    return rows


def _behaviour(episodes: pa.Table, format_penalty: float) -> dict[str, Any]:
    """How the episodes went, over all of them. The score is the return without the penalties for the format."""

    def total(column: str) -> float:
        return float(pc.sum(episodes[column]).as_py())

    def rate(kind: str) -> float | None:
        """Share of the turns; None for an evaluation that was made when this was not counted."""
        column = f"{kind}_turns"
        return _round(total(column) / max(1.0, total("turns"))) if column in episodes.column_names else None

    ends = episodes["end_reason"].to_pylist()
    penalties = format_penalty * (total("turns") - total("valid_turns"))
    return {
        "return_mean": _round(total("return") / len(episodes)),
        "score_mean": _round((total("return") - penalties) / len(episodes)),
        "ends": {reason: _round(ends.count(reason) / len(ends)) for reason in sorted(set(ends))},
        "action_token_share": _round(total("action_tokens") / max(1.0, total("tokens"))),
        "valid_action_rate": rate("valid"),
        **{f"{kind}_rate": rate(kind) for kind in RESPONSES if kind != "valid"},
        "truncated_rate": _round(sum(map(ends.count, CUT_OFF)) / len(ends)),
    }


def _training(config: Config, method: str, curves: Curves | None) -> dict[str, Any]:
    """How the method was trained: settings from params.yaml, the rest from its learning curves; all null without them."""
    if curves is None:
        keys = ("iterations", "kl_iteration_action_first3", "gradient_share_action", "learning_rate", "regulariser")
        return dict.fromkeys((*keys, "non_finite_losses", "status", "source", *SPENT))
    first = [row["kl_iteration_action"] for rows in curves.values() for row in rows[:3] if "kl_iteration_action" in row]
    shares = [r[SHARE] for rows in curves.values() for r in rows if SHARE in r]
    settings = config.methods[method]
    own = {slot: section.model_dump(mode="json") for slot, section in custom_sections(settings).items()}
    iterations = mean(len(rows) for rows in curves.values())
    # What the methods were given, to see at what they are compared. A path is an episode.
    episodes, tokens = (
        mean(int(sum(r[key] for r in rows)) for rows in curves.values()) for key in ("episodes", "tokens")
    )
    given = (episodes, tokens, episodes / (config.rollout.groups * iterations))
    return {
        "iterations": iterations,
        "kl_iteration_action_first3": statistics.significant(float(np.mean(first))) if first else None,
        "gradient_share_action": _round(float(np.mean(shares))) if shares else None,
        "learning_rate": settings.learning_rate,
        "regulariser": settings.regulariser.model_dump(mode="json"),
        "non_finite_losses": int(sum(row.get("non_finite_losses", 0) for rows in curves.values() for row in rows)),
        "status": settings.status,
        "source": settings.source,
        **({"custom": own} if own else {}),
        **{key: round(value, 6) for key, value in zip(SPENT, given, strict=True)},
    }


def _compared(kind: str, difference: Difference | None) -> dict[str, Any]:
    name = f"difference_to_{kind}"
    if difference is None:
        return dict.fromkeys(f"{name}{part}" for part in ("", "_ci_low", "_ci_high", "_seeds", "_by_seed"))
    return {
        name: _round(difference.value),
        **_bounds(f"{name}_ci", difference.interval),
        f"{name}_seeds": len(difference.by_seed),
        f"{name}_by_seed": [_round(value) for value in difference.by_seed],
    }


def _bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": _round(low), f"{name}_high": _round(high)}


def _round(value: float | None) -> float | None:
    """To six digits; None stays, and is what has no finite value."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), 6) + 0.0  # + 0.0 makes -0.0 a zero
