"""The comparison of all methods: one row per environment, method and temperature."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.analysis import efficiency, hypotheses
from pipeline.analysis.alarmed import alarmed, row_alarms
from pipeline.analysis.curves import Curves
from pipeline.analysis.hypotheses import ESTIMAND, Hypothesis
from pipeline.analysis.intervals import LEVEL, Interval, interval
from pipeline.analysis.looks import look_entry, looks_of
from pipeline.analysis.scores import (
    Scores,
    balanced_scores,
    interquartile_mean,
    paired_grid,
    probability_of_improvement,
    rounded,
    significant,
)
from pipeline.analysis.verdicts import Difference, measure
from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.trajectories.results import read_results
from pipeline.trajectories.trajectory import CUT_OFF, RESPONSES
from pipeline.workspace.errors import UserError, line_of
from pipeline.workspace.files import read_record
from pipeline.workspace.finite import NotFiniteError, require_finite
from pipeline.workspace.layout import Layout
from pipeline.workspace.manifest import listed_text

REFERENCE = "reference"
"""What the reference policy is called where methods have their names."""
SPENT = ("training_episodes", "training_tokens", "paths_per_state")
"""Keys of a row, of one training as means over seeds: episodes, sampled tokens, and episodes per initial state."""
SHARE = "measured_gradient_share_action"
"""Metric of the curves: the action tokens' share of the gradient, from per-token gradients."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What the comparison reads; keys are (environment, method)."""

    episodes: Mapping[tuple[str, str], pa.Table]
    """Per-episode results of all seeds and temperatures, the reference policy's among them."""
    curves: Mapping[tuple[str, str], Curves]
    timings: Mapping[tuple[str, str], Curves]
    """Wall-clock: cumulative ``seconds``; a method may be absent."""
    matchings: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    """How the learning rate was found (see ``pipeline.training.matching.matched``), of methods that are matched."""


def read_inputs(config: Config, layout: Layout) -> Inputs:
    """Read evaluations, curves and, where they exist, timings.

    Raises:
        UserError: an evaluation or a curve is missing or damaged, or a number in one is not finite.
    """
    trained = list(product(config.environments, config.methods))
    played = [*trained, *((environment, REFERENCE) for environment in config.environments)]
    needed = [layout.evaluations(*key) for key in played] + [layout.curves(*key) for key in trained]
    if missing := [file for file in needed if not file.exists()]:
        raise UserError("\n".join(f"{file}: no such file; `dvc repro` makes it" for file in missing))
    read = {key: read_record(layout.curves(*key)) for key in trained}
    return Inputs(
        {key: _read_played(layout.evaluations(*key)) for key in played},
        {key: found["seeds"] for key, found in read.items()},
        read_timings(config, layout),
        {key: found["matching"] for key, found in read.items() if "matching" in found},
    )


def _read_played(file: Path) -> pa.Table:
    """The per-episode results in a file; a return that is NaN, infinite or not there is named."""
    table = read_results(file)
    returns = np.array(table["return"].to_pylist(), dtype=np.float64)

    def place(row: int) -> str:
        seed, state, rollout = (table[name][row].as_py() for name in ("seed", "state", "rollout"))
        return f"row {row} (seed {seed}, episode {rollout} of state {state})"

    try:
        require_finite(f"{file}: column return", returns, place)
    except NotFiniteError as error:
        raise UserError(f"{error}; `dvc repro` makes it again once it is deleted") from None
    return table


def read_timings(config: Config, layout: Layout) -> dict[tuple[str, str], Curves]:
    """(environment, method) -> wall-clock of its trainings, of those that are there.

    Raises:
        UserError: a file is damaged.
    """
    trained = product(config.environments, config.methods)
    return {key: read_record(layout.timings(*key))["seeds"] for key in trained if layout.timings(*key).exists()}


def read_comparison(layout: Layout) -> dict[str, Any]:
    """What the stage ``compare`` has written as JSON.

    Raises:
        UserError: it is missing or damaged.
    """
    text = listed_text(layout.plots, layout.comparison)
    try:
        comparison: dict[str, Any] = json.loads(text)
        return comparison
    except (ValueError, RecursionError) as error:
        raise UserError(f"{layout.comparison}: not JSON: {line_of(error)}") from None


def compare(config: Config, inputs: Inputs) -> dict[str, Any]:
    """All rows, ready to be written as JSON: no NaN, and the same for the same inputs.

    Rates are in [0, 1]. Measured numbers are rounded to 6 digits (p and KL: 6 significant ones), settings are as in
    params.yaml, and what does not apply is null. ``hypotheses`` are the declared comparisons, judged as one ``family``;
    ``difference_to_*`` of a row is paired over common seeds and states, has an interval from two seeds on, and of what is
    declared also the adjusted p and verdict. ``probability_of_improvement`` is over the uniform counterpart. The reference
    policy has rows of its own. ``tokens`` is the budget of every training, if there is one; ``iterations`` and ``SPENT``
    are what it took. ``look`` is there where seeds are added until it is decided: where that stands; ``alarms`` and
    ``alarmed`` where trainings have alarmed.

    Raises:
        ValueError: an evaluation is unbalanced or lacks a temperature, or two of them share no seed or state.
    """
    headline_temperature = config.evaluation.temperatures[0]
    scores = {
        (environment, method, temperature): balanced_scores(inputs.episodes[environment, method], temperature)
        for environment, temperature in product(config.environments, config.evaluation.temperatures)
        for method in (*config.methods, REFERENCE)
    }
    finals = {(e, m): found for (e, m, temperature), found in scores.items() if temperature == headline_temperature}
    looks = [] if config.seeds_until is None else looks_of(config, finals)
    judged = looks[-1].differences if looks else hypotheses.judged(config, finals)
    of_row = {(one.environment, one.method, str(one.kind)): found for one, found in judged.items()}
    grid = product(config.environments, config.evaluation.temperatures)
    return {
        "schema": 3,
        "comparison": config.comparison,
        "tokens": config.train.tokens,
        "estimand": ESTIMAND,
        "family": hypotheses.family_entry(config.compare, len(judged)),
        "smallest_effect": config.compare.smallest_effect,
        "level": LEVEL,
        "exclusions": [one.model_dump(mode="json") for one in config.compare.exclusions],
        **({"look": look_entry(config.seeds_until, looks)} if config.seeds_until is not None else {}),
        "hypotheses": _hypotheses(config, inputs, judged),
        "rows": [row for place in grid for row in _rows(config, inputs, scores, of_row, *place)],
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
    if row[name] is None:
        return None
    low = row[f"{name}_ci_low"]
    return Difference(
        row[name],
        None if low is None else Interval(low, row[f"{name}_ci_high"]),
        tuple(row[f"{name}_by_seed"]),
        **{part: row[f"{name}_{part}"] for part in ("p", "p_adjusted", "verdict")},
        alarmed=tuple(row.get(f"{name}_alarmed", ())),
    )


def _hypotheses(config: Config, inputs: Inputs, judged: Mapping[Hypothesis, Difference]) -> list[dict[str, Any]]:
    """The declared comparisons, each with its sample efficiency."""
    thresholds = {
        environment: efficiency.threshold_of([inputs.curves[environment, method] for method in config.methods])
        for environment in config.environments
    }
    curves = _without_excluded(config, inputs.curves)
    return [
        hypotheses.entry(
            one,
            difference,
            config.compare.smallest_effect,
            efficiency.compared(
                curves[one.environment, one.method],
                curves[one.environment, one.against],
                thresholds[one.environment],
            ),
            alarmed({method: curves[one.environment, method] for method in (one.method, one.against)}),
        )
        for one, difference in judged.items()
    ]


def _without_excluded(
    config: Config, curves: Mapping[tuple[str, str], Curves]
) -> dict[tuple[str, str], dict[str, list[dict[str, float]]]]:
    """Curves of (environment, method) without the seeds of ``compare.exclusions``."""
    left_out = {(one.environment, one.method, str(one.seed)) for one in config.compare.exclusions}
    return {
        key: {seed: rows for seed, rows in seeds.items() if (*key, seed) not in left_out}
        for key, seeds in curves.items()
    }


def _rows(
    config: Config,
    inputs: Inputs,
    all_scores: Mapping[tuple[str, str, float], Scores],
    judged: Mapping[tuple[str, str, str], Difference],
    environment: str,
    temperature: float,
) -> list[dict[str, Any]]:
    methods = [*config.methods, REFERENCE]
    scores = {method: all_scores[environment, method, temperature] for method in methods}
    paired = hypotheses.without_excluded(config, {(environment, method): one for method, one in scores.items()})
    headlined, counted = temperature == config.evaluation.temperatures[0], _without_excluded(config, inputs.curves)
    reference = _rate_interval(scores[REFERENCE])
    rows = []
    for method in methods:
        own, table = scores[method], inputs.episodes[environment, method]
        uniform, control = config.compare.uniform.get(method), config.compare.control.get(method)
        others = {"uniform": uniform, "control": control, "reference": None if method == REFERENCE else REFERENCE}
        differences = {
            kind: (judged.get((environment, method, kind)) if headlined else None)
            or measure(paired_grid(paired[environment, method], paired[environment, other]))
            for kind, other in others.items()
            if other
        }
        improvement = None if uniform is None else probability_of_improvement(own, scores[uniform])
        seed_means = own.success.mean(axis=(1, 2))
        collapsed = None if method == REFERENCE or reference is None else int((seed_means < reference.low).sum())
        rows.append(
            {
                "environment": environment,
                "method": method,
                "temperature": temperature,
                "headline": headlined,
                "seeds": len(own.seeds),
                "states": len(own.states),
                "episodes": own.success.size,
                "success_mean": rounded(own.success.mean()),
                "success_iqm": rounded(interquartile_mean(own.success)),
                **_bounds("success_ci", _rate_interval(own)),
                "seed_success": [rounded(mean) for mean in seed_means],
                "reference_success": rounded(scores[REFERENCE].success.mean()),
                **_bounds("reference_ci", reference),
                "uniform": uniform,
                "control": control,
                **{key: value for k in others for key, value in _compared(k, differences.get(k)).items()},
                **_alarmed(environment, method, others, counted),
                "probability_of_improvement": rounded(improvement),
                "collapsed_seeds": collapsed,
                **_behaviour(
                    table.filter(pc.equal(table["temperature"], temperature)),
                    config.environments[environment].format_penalty,
                ),
                **_training(config, method, inputs.curves.get((environment, method))),
                **row_alarms(inputs.curves.get((environment, method))),
                **_matching(inputs.matchings.get((environment, method))),
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
        return rounded(total(column) / max(1.0, total("turns"))) if column in episodes.column_names else None

    ends = episodes["end_reason"].to_pylist()
    penalties = format_penalty * (total("turns") - total("valid_turns"))
    return {
        "return_mean": rounded(total("return") / len(episodes)),
        "score_mean": rounded((total("return") - penalties) / len(episodes)),
        "ends": {reason: rounded(ends.count(reason) / len(ends)) for reason in sorted(set(ends))},
        "action_token_share": rounded(total("action_tokens") / max(1.0, total("tokens"))),
        "valid_action_rate": rate("valid"),
        **{f"{kind}_rate": rate(kind) for kind in RESPONSES if kind != "valid"},
        "truncated_rate": rounded(sum(map(ends.count, CUT_OFF)) / len(ends)),
    }


def _training(config: Config, method: str, curves: Curves | None) -> dict[str, Any]:
    """How the method was trained: settings from params.yaml, the rest from its learning curves; all null without them."""
    if curves is None:
        keys = ("iterations", "kl_update_action_first3", "gradient_share_action", "learning_rate", "regulariser")
        return dict.fromkeys((*keys, "non_finite_losses", "status", "source", *SPENT))
    # It is measured in the first iterations in which the policy learns, and in some later ones.
    measured = ([row["kl_update_action"] for row in rows if "kl_update_action" in row] for rows in curves.values())
    first = [kl for values in measured for kl in values[:3]]
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
        "kl_update_action_first3": significant(float(np.mean(first))) if first else None,
        "gradient_share_action": rounded(float(np.mean(shares))) if shares else None,
        "learning_rate": settings.learning_rate,
        "regulariser": settings.regulariser.model_dump(mode="json"),
        "non_finite_losses": int(sum(row.get("non_finite_losses", 0) for rows in curves.values() for row in rows)),
        "status": settings.status,
        "source": settings.source,
        **({"custom": own} if own else {}),
        **{key: round(value, 6) for key, value in zip(SPENT, given, strict=True)},
    }


def _rate_interval(scores: Scores) -> Interval | None:
    """Interval of one method's success. It knows nothing of a rate's range: the part outside [0, 1] is cut off."""
    found = interval(scores.grid)
    return None if found is None else Interval(*map(float, np.clip(found, 0.0, 1.0)))


def _matching(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a method's learning rate was found, and in place of params.yaml's the rate; null where it is params.yaml's own."""
    return {"matched": None} if found is None else {"matched": dict(found), "learning_rate": found["learning_rate"]}


def _compared(kind: str, difference: Difference | None) -> dict[str, Any]:
    name = f"difference_to_{kind}"
    if difference is None:
        parts = ("", "_ci_low", "_ci_high", "_seeds", "_by_seed", "_p", "_p_adjusted", "_verdict")
        return dict.fromkeys(f"{name}{part}" for part in parts)
    return {
        name: rounded(difference.value),
        **_bounds(f"{name}_ci", difference.interval),
        f"{name}_seeds": len(difference.by_seed),
        f"{name}_by_seed": [rounded(value) for value in difference.by_seed],
        f"{name}_p": significant(difference.p),
        f"{name}_p_adjusted": significant(difference.p_adjusted),
        f"{name}_verdict": difference.verdict,
    }


def _alarmed(
    environment: str, method: str, others: Mapping[str, str | None], curves: Mapping[tuple[str, str], Curves]
) -> dict[str, list[str]]:
    """``difference_to_<kind>_alarmed``: in which of the two methods trainings have alarmed; nothing where in none."""
    pairs = {kind: (method, other) for kind, other in others.items() if other is not None}
    found = {
        kind: alarmed({one: curves[environment, one] for one in pair if (environment, one) in curves})
        for kind, pair in pairs.items()
    }
    return {f"difference_to_{kind}_alarmed": list(names) for kind, names in found.items() if names}


def _bounds(name: str, bounds: Interval | None) -> dict[str, float | None]:
    low, high = bounds or (None, None)
    return {f"{name}_low": rounded(low), f"{name}_high": rounded(high)}
