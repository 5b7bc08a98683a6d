"""The comparison of all methods: one row per environment, method and temperature, and warnings about what it can bear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.analysis import statistics
from pipeline.analysis.differences import NO_VERDICT
from pipeline.analysis.statistics import VERDICT_SEEDS, Difference, Interval
from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import CUT_OFF, RESPONSES
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.randomness import generator

REFERENCE = "reference"
"""What the reference policy is called where methods have their names."""
KL_DRIFT = 0.2
"""Largest relative difference of a control's KL per iteration from its method's that passes without a warning. It is
KL(behaviour || policy) on action tokens, after all of an iteration's updates, on its last minibatch."""
SHORTFALL = 0.05
"""Largest share of ``train.tokens`` that may be left at a training's end without a warning."""
SPENT = ("training_episodes", "training_tokens", "paths_per_state")
"""Keys of a row, of one training as means over seeds: episodes, sampled tokens, and episodes per initial state."""
SHARE = "measured_gradient_share_action"
"""Metric of the curves: the action tokens' share of the gradient, from per-token gradients."""

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
    trained = [(environment, method) for environment in config.environments for method in config.methods]
    played = trained + [(environment, REFERENCE) for environment in config.environments]

    needed = [layout.evaluations(*key) for key in played] + [layout.curves(*key) for key in trained]
    missing = [str(file) for file in needed if not file.exists()]
    if missing:
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
    keys = [(environment, method) for environment in config.environments for method in config.methods]
    files = {key: layout.timings(*key) for key in keys}
    return {key: read_json(file)["seeds"] for key, file in files.items() if file.exists()}


def compare(config: Config, inputs: Inputs) -> dict[str, Any]:
    """All rows and warnings, ready to be written as JSON: no NaN, and the same for the same inputs.

    Rates are in [0, 1]. Measured numbers are rounded to 6 digits (KL per iteration: 6 significant ones), settings are as
    in params.yaml, and what does not apply is null. ``difference_to_*`` is paired over common seeds and states, and has an
    interval (``_ci_low``, ``_ci_high``) from ``VERDICT_SEEDS`` paired seeds on, which is its verdict.
    ``probability_of_improvement`` is over the uniform counterpart. The reference policy has rows of its own. ``tokens`` is
    the budget of every training, if there is one; ``iterations`` and ``SPENT`` are what it took.

    Raises:
        ValueError: an evaluation is unbalanced or lacks a temperature, or two of them share no seed or state.
    """
    rows = [
        row
        for environment in config.environments
        for temperature in config.evaluation.temperatures
        for row in _rows(config, inputs, environment, temperature)
    ]
    return {
        "schema": 2,
        "comparison": config.comparison,
        "resamples": config.compare.resamples,
        "tokens": config.train.tokens,
        "rows": rows,
        "warnings": _warnings(config, inputs, rows),
    }


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
        improvement = None if uniform is None else statistics.probability_of_improvement(own, scores[uniform])
        differences = {
            kind: None if other is None else statistics.paired_difference(own, scores[other])
            for kind, other in (
                ("reference", None if method == REFERENCE else REFERENCE),
                ("uniform", uniform),
                ("control", control),
            )
        }
        seed_means = own.success.mean(axis=(1, 2))
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
                **_bounds("t_ci", _rate_bounds(statistics.t_interval(own.success))),
                "seed_success": [_round(mean) for mean in seed_means],
                "reference_success": _round(scores[REFERENCE].success.mean()),
                **_bounds("reference_ci", reference),
                "uniform": uniform,
                "control": control,
                **{key: value for kind, found in differences.items() for key, value in _compared(kind, found).items()},
                "probability_of_improvement": None if improvement is None else _round(improvement),
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
    return {
        "iterations": mean(len(rows) for rows in curves.values()),
        "kl_iteration_action_first3": _finite(float(f"{np.mean(first):.6g}")) if first else None,
        "gradient_share_action": _round(float(np.mean(shares))) if shares else None,
        "learning_rate": settings.learning_rate,
        "regulariser": settings.regulariser.model_dump(mode="json"),
        "non_finite_losses": int(sum(row.get("non_finite_losses", 0) for rows in curves.values() for row in rows)),
        "status": settings.status,
        "source": settings.source,
        **({"custom": own} if own else {}),
        **_spent(config, curves),
    }


def _spent(config: Config, curves: Curves) -> dict[str, float]:
    """``SPENT``: what the methods were given, to see at what they are compared. A path is an episode."""
    episodes, tokens = (
        mean(int(sum(row[key] for row in rows)) for rows in curves.values()) for key in ("episodes", "tokens")
    )
    states = config.rollout.groups * mean(len(rows) for rows in curves.values())
    return dict(zip(SPENT, (round(episodes, 6), round(tokens, 6), round(episodes / states, 6)), strict=True))


def _warnings(config: Config, inputs: Inputs, rows: list[dict[str, Any]]) -> list[str]:
    """What a reader should know before believing the table; one line each."""
    found = []
    for environment in config.environments:
        own = {row["method"]: row for row in rows if row["environment"] == environment and row["headline"]}
        few = [name for name in config.methods if own[name]["seeds"] < VERDICT_SEEDS]
        if few:
            least = min(own[name]["seeds"] for name in few)
            found.append(
                f"{environment}: {', '.join(few)}: as few as {least} seed{'s' * (least > 1)}: {NO_VERDICT}; "
                f"give `seeds` {VERDICT_SEEDS} or more (of a sweep's confirmation: `sweep.confirm_seeds`)"
            )
        for name in config.methods:
            texts = _method_warnings(config, own, name) + _length_warnings(config, inputs.curves[environment, name])
            found += [f"{environment}: {name}: {text}" for text in texts]
    return found


def _length_warnings(config: Config, curves: Curves) -> list[str]:
    """Trainings that were not as long as they should have been: equally, or as their tokens allow."""
    plan = config.train
    if plan.tokens is None:
        lengths = sorted({len(rows) for rows in curves.values()})
        return [f"seeds were trained for different numbers of iterations: {lengths}"] if len(lengths) > 1 else []
    ended = {seed: sum(row["tokens"] for row in rows) for seed, rows in curves.items() if len(rows) >= plan.iterations}
    short = {seed: tokens for seed, tokens in ended.items() if tokens < (1 - SHORTFALL) * plan.tokens}
    if not short:
        return []
    return [
        f"train.iterations ({plan.iterations}) ended seed{'s' * (len(short) > 1)} {', '.join(short)} after as few as "
        f"{min(short.values()):.0f} sampled tokens of train.tokens ({plan.tokens}): raise train.iterations to compare at "
        "equal tokens"
    ]


def _method_warnings(config: Config, rows: Mapping[str, Mapping[str, Any]], method: str) -> list[str]:
    row, found = rows[method], []
    uniform, control = row["uniform"], row["control"]
    if row["non_finite_losses"]:
        found.append(f"{row['non_finite_losses']} updates had a non-finite loss or gradient and were skipped")
    if uniform and not control:
        found.append(f"no matched control in compare.control: a difference to {uniform} may be one of step size")
    for other in filter(None, (uniform, control)):
        if config.methods[method].regulariser != config.methods[other].regulariser:
            found.append(f"its entropy or KL terms differ from those of {other}")
    for kind in ("reference", "uniform", "control"):
        paired = row[f"difference_to_{kind}_seeds"]
        if paired is not None and paired < row["seeds"]:
            unpaired = f"only {paired} of {row['seeds']} seeds are paired with {row.get(kind, kind)}"
            found.append(unpaired + (f": {NO_VERDICT}" if paired < VERDICT_SEEDS <= row["seeds"] else ""))
    if control:
        mine, theirs = (rows[name]["kl_iteration_action_first3"] for name in (method, control))
        if mine is None or theirs is None:
            found.append(f"KL per iteration on action tokens is not known for it and its control {control}")
        elif abs(theirs - mine) > KL_DRIFT * mine:
            found.append(
                f"KL per iteration on action tokens over the first 3 iterations is {mine:.3g}, its control's {theirs:.3g} "
                f"({control}, off by more than {KL_DRIFT:.0%}): {_advice(config, method, control)}"
            )
    return found


def _advice(config: Config, method: str, control: str) -> str:
    """What a drift of the KL per iteration means: a matched control's learning rate is there to be adjusted."""
    if config.methods[method].learning_rate == config.methods[control].learning_rate:
        return "a difference may be one of step size"
    return f"adjust methods.{control}.learning_rate"


def _compared(kind: str, difference: Difference | None) -> dict[str, Any]:
    name = f"difference_to_{kind}"
    return {
        name: None if difference is None else _round(difference.value),
        **_bounds(f"{name}_ci", None if difference is None else difference.interval),
        f"{name}_seeds": None if difference is None else len(difference.by_seed),
        f"{name}_by_seed": None if difference is None else [_round(value) for value in difference.by_seed],
    }


def _bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    return {
        f"{name}_low": None if interval is None else _round(interval.low),
        f"{name}_high": None if interval is None else _round(interval.high),
    }


def _rate_bounds(interval: Interval | None) -> Interval | None:
    """A t-interval knows nothing of a rate's range; the part outside [0, 1] is cut off."""
    return None if interval is None else Interval(max(0.0, interval.low), min(1.0, interval.high))


def _round(value: float) -> float | None:
    return _finite(round(float(value), 6) + 0.0)  # + 0.0 makes -0.0 a zero


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
