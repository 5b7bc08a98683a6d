"""The comparison on small made-up results: rows worked out by hand, warnings, tables, figures and the page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.analysis.comparison import REFERENCE, SPENT, Inputs, compare, read_inputs
from pipeline.analysis.metrics import headline_metrics
from pipeline.report.charts import difference_charts, plain
from pipeline.report.comparison_figures import learning_figure, learning_panels, write_comparison_figures
from pipeline.report.comparison_tables import (
    common_terms,
    comparison_markdown,
    comparison_text,
    overview_markdown,
    result_table,
)
from pipeline.report.curve_charts import training_charts
from pipeline.report.html import embedded, report_html
from pipeline.report.warnings import comparison_warnings
from pipeline.settings.params import Config, parse
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.randomness import generator
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
ITERATIONS = 12
RATES = {"grpo": 0.4, "grpo_actfocus": 0.8, "grpo_lr_matched": 0.5, REFERENCE: 0.3}
KEYS = """environment method temperature headline seeds states episodes success_mean success_iqm success_ci_low
    success_ci_high t_ci_low t_ci_high reference_success reference_ci_low reference_ci_high difference_to_reference
    difference_to_reference_ci_low difference_to_reference_ci_high uniform difference_to_uniform
    difference_to_uniform_ci_low difference_to_uniform_ci_high probability_of_improvement
    difference_to_reference_by_seed difference_to_uniform_by_seed difference_to_control_by_seed control difference_to_control
    difference_to_control_ci_low difference_to_control_ci_high return_mean action_token_share valid_action_rate
    disallowed_rate malformed_rate cut_rate truncated_rate iterations kl_iteration_action_first3 learning_rate regulariser collapsed_seeds non_finite_losses
    gradient_share_action status source training_episodes training_tokens paths_per_state"""


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
                "resamples": 200,
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
            "kl_iteration_action": kl * (1.0 + number),
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


def inputs(config: Config, control_kl: float = 0.011) -> Inputs:
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


def solved_by_hand(config: Config, **wins: list[list[list[int]]]) -> Inputs:
    """Inputs whose success at both temperatures is given as (seeds, states, rollouts)."""
    found = inputs(config)
    tables = {}
    for (environment, method), table in found.episodes.items():
        grid = np.array(wins[method])
        cells = zip(*(table[name].to_pylist() for name in ("seed", "state", "rollout")), strict=True)
        success = [bool(grid[seed, int(state.split()[1]), rollout]) for seed, state, rollout in cells]
        place = table.schema.get_field_index("success")
        tables[environment, method] = table.set_column(place, "success", [success])
    return replace(found, episodes=tables)


def compared(config: Config, made: Inputs) -> dict[str, Any]:
    """The comparison as the stage writes it."""
    found = compare(config, made)
    return {**found, "warnings": comparison_warnings(config, made.curves, found)}


def row_of(comparison: dict[str, Any], method: str, temperature: float = 0.5) -> dict[str, Any]:
    (row,) = [r for r in comparison["rows"] if r["method"] == method and r["temperature"] == temperature]
    return dict(row)


def test_rows_hold_what_can_be_worked_out_by_hand() -> None:
    config = configuration(seeds=[0, 1], evaluation={"states": 2, "rollouts": 2, "temperatures": [0.5, 1.0]})
    found = compared(
        config,
        solved_by_hand(
            config,
            grpo=[[[0, 1], [0, 0]], [[0, 0], [1, 1]]],
            grpo_actfocus=[[[1, 1], [1, 1]], [[1, 1], [0, 0]]],
            grpo_lr_matched=[[[1, 1], [0, 1]], [[0, 0], [0, 0]]],
            reference=[[[0, 1], [0, 1]], [[0, 1], [0, 1]]],
        ),
    )
    row = row_of(found, "grpo_actfocus")
    assert (row["seeds"], row["states"], row["episodes"], row["headline"]) == (2, 2, 8, True)
    assert row["success_mean"] == 0.75
    assert row["success_iqm"] == 1.0  # of 0, 1, 1, 1 the middle two
    assert row["seed_success"] == [1.0, 0.5]
    assert (row["reference_success"], row["reference_ci_low"], row["reference_ci_high"]) == (0.5, 0.5, 0.5)
    assert row["difference_to_reference"] == 0.25
    assert (row["uniform"], row["difference_to_uniform"]) == ("grpo", 0.375)
    assert row["probability_of_improvement"] == (1 + 1 + 1 + 0.5) / 4  # 1, 0.5 against 0.25, 0.5
    assert (row["control"], row["difference_to_control"]) == ("grpo_lr_matched", 0.375)
    assert (row["action_token_share"], row["valid_action_rate"]) == (0.1, 0.75)
    assert row["kl_iteration_action_first3"] == pytest.approx(0.02)  # 0.01 * (1 + 2 + 3) / 3
    assert (row["iterations"], row["collapsed_seeds"], row["non_finite_losses"]) == (ITERATIONS, 0, 0)
    assert row_of(found, "grpo")["collapsed_seeds"] == 1  # seed 0 has 0.25, below 0.5
    assert row_of(found, "grpo_lr_matched")["learning_rate"] == 3e-7
    assert (row["t_ci_low"], row["t_ci_high"]) == (0.0, 1.0)  # cut off at the ends of a rate


def test_every_row_has_every_key_and_the_reference_has_rows_of_its_own() -> None:
    config = configuration()
    found = compared(config, inputs(config))
    assert (found["schema"], found["comparison"]) == (2, "toy")
    assert len(found["rows"]) == 2 * 4
    assert all(set(KEYS.split()) <= set(row) for row in found["rows"])
    assert len({tuple(row) for row in found["rows"]}) == 1
    reference = row_of(found, REFERENCE)
    unknown = ("difference_to_reference", "uniform", "learning_rate", "iterations", "collapsed_seeds", "regulariser")
    assert all(reference[key] is None for key in (*unknown, *SPENT))
    assert reference["success_mean"] == reference["reference_success"]
    assert [row["headline"] for row in found["rows"]] == [True] * 4 + [False] * 4
    mine = row_of(found, "grpo_actfocus")
    assert mine["return_mean"] == pytest.approx(mine["success_mean"] - 0.5, abs=1e-6)
    assert mine["truncated_rate"] == pytest.approx(1 - mine["success_mean"], abs=1e-6)
    assert mine["regulariser"] == config.methods["grpo_actfocus"].regulariser.model_dump()


def test_an_environments_own_outcomes_are_columns_and_its_score_is_without_penalties() -> None:
    config = configuration()
    given = inputs(config)
    usual = result_table(compared(config, given), "lake", config.evaluation.temperatures[0])
    assert "score" not in usual.header
    own = ("lake", "grpo")
    table = given.episodes[own]
    ends = ["bought" if won else "turns" for won in table["success"].to_pylist()]
    given.episodes[own] = table.set_column(table.schema.get_field_index("end_reason"), "end_reason", pa.array(ends))
    found = compared(config, given)
    mine = row_of(found, "grpo")
    assert mine["ends"] == {"bought": mine["success_mean"], "turns": pytest.approx(1 - mine["success_mean"])}
    penalty = next(iter(config.environments.values())).format_penalty
    assert mine["score_mean"] == pytest.approx(mine["return_mean"] - penalty * (4 - 3))
    shown = result_table(found, "lake", config.evaluation.temperatures[0])
    place = shown.header.index("score")
    assert shown.header[place : place + 2] == ["score", "bought"]
    assert {len(row) for row in shown.rows} == {len(shown.header)}
    assert shown.rows[-1][place + 1] == "0.000"


def test_malformed_cut_and_disallowed_turns_are_columns_of_their_own() -> None:
    config = configuration()
    given = inputs(config)
    table = given.episodes["lake", "grpo"]
    counts = {"turns": 10, "valid_turns": 4, "disallowed_turns": 1, "malformed_turns": 2, "cut_turns": 3}
    for name, count in counts.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([count] * len(table)))
    given.episodes["lake", "grpo"] = table
    earlier = ["disallowed_turns", "malformed_turns", "cut_turns"]
    given.episodes["lake", REFERENCE] = given.episodes["lake", REFERENCE].drop_columns(earlier)
    found = compared(config, given)
    shown = result_table(found, "lake", config.evaluation.temperatures[0])
    place = shown.header.index("valid actions")
    assert shown.header[place : place + 4] == ["valid actions", "disallowed", "malformed", "cut"]
    cells = {row[0]: row[place : place + 4] for row in shown.rows}
    assert cells["grpo"] == ["0.400", "0.100", "0.200", "0.300"]
    assert cells[REFERENCE] == ["0.750", "–", "–", "–"]  # evaluated when only valid turns were counted
    metrics = headline_metrics(found)["lake"]
    assert [metrics["grpo"][f"{kind}_rate"] for kind in ("disallowed", "malformed", "cut")] == [0.1, 0.2, 0.3]
    assert "cut_rate" not in metrics[REFERENCE]


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    config = configuration()
    for name in ("a", "b"):
        write_json(tmp_path / name, compared(config, inputs(config)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_adding_a_method_leaves_the_rows_of_the_others() -> None:
    config = configuration()
    more = configuration(methods={**{m: {} for m in config.methods}, "ppo": {}})
    found, with_more = compared(config, inputs(config)), compared(more, inputs(more))
    for method in config.methods:
        a, b = row_of(found, method), row_of(with_more, method)
        assert {k: v for k, v in a.items() if k != "learning_rate"} == {k: b[k] for k in a if k != "learning_rate"}


def test_files_are_read_and_timings_may_be_absent(tmp_path: Path) -> None:
    config = configuration()
    made, layout = inputs(config), Layout(tmp_path)
    with pytest.raises(UserError, match=r"lake-grpo\.parquet: no such file; `dvc repro` makes it"):
        read_inputs(config, layout)
    for (environment, method), table in made.episodes.items():
        layout.evaluations(environment, method).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, layout.evaluations(environment, method))
    for (environment, method), curves in made.curves.items():
        write_json(layout.curves(environment, method), {"seeds": curves})
    write_json(layout.timings("lake", "grpo"), {"seeds": made.timings["lake", "grpo"]})
    found = read_inputs(config, layout)
    assert set(found.timings) == {("lake", "grpo")}
    assert compared(config, found) == compared(config, made)


def test_drift_of_a_control_is_warned_of_beyond_a_fifth() -> None:
    config = configuration()
    assert not any("KL per iteration" in warning for warning in compared(config, inputs(config, 0.0119))["warnings"])
    for drifted in (0.0121, 0.0079):
        (warning,) = [w for w in compared(config, inputs(config, drifted))["warnings"] if "KL per iteration" in w]
        assert "lake: grpo_actfocus: KL per iteration on action tokens" in warning
        assert "methods.grpo_lr_matched.learning_rate" in warning


def test_other_warnings() -> None:
    config = configuration(
        methods={"grpo": {}, "grpo_actfocus": {"regulariser": {"kind": "fixed", "entropy": 0.5, "kl": 0.0}}},
        compare={"uniform": {"grpo_actfocus": "grpo"}, "resamples": 200},
    )
    made = inputs(config)
    made.curves["lake", "grpo"]["0"][4]["non_finite_losses"] = 2.0
    made.curves["lake", "grpo"]["1"].pop()
    found = compared(config, made)
    text = "\n".join(found["warnings"])
    assert "grpo: 2 updates had a non-finite loss" in text
    assert "grpo: seeds were trained for different numbers of iterations: [11, 12]" in text
    assert "grpo_actfocus: no matched control" in text
    assert "grpo_actfocus: its entropy or KL terms differ from those of grpo" in text
    assert common_terms(found).startswith("The methods differ in their entropy and KL terms")
    assert "| entropy bonus 0.5, KL to the reference none |" in comparison_markdown(found)


def test_what_methods_were_given_is_counted_and_shown() -> None:
    """Iterations of seeds 0 to 3 have 4000, 4010, 4020 and 4030 tokens; then seed 3 ends an iteration early."""
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    row = row_of(found, "grpo")
    assert row["training_tokens"] == ITERATIONS * 4015
    assert (row["training_episodes"], row["paths_per_state"]) == (ITERATIONS * 128, 128 / config.rollout.groups)
    assert f"| `grpo` | {ITERATIONS} | {ITERATIONS * 128} | {ITERATIONS * 4015} | 16 | " in comparison_markdown(found)
    made.curves["lake", "grpo"]["3"].pop()
    row = row_of(compared(config, made), "grpo")
    assert (row["iterations"], row["training_tokens"]) == (ITERATIONS - 0.25, ITERATIONS * 4015 - 4030 / 4)
    assert row["paths_per_state"] == 16


BUDGET = 40400


def budgeted(iterations: int = ITERATIONS + 1) -> tuple[Config, Inputs]:
    """Trainings to a budget: seeds of 10 iterations, but of grpo_actfocus, whose iterations are smaller and end unevenly."""
    train = read_yaml(ROOT / "params.yaml")["train"]
    config = configuration(train={**train, "tokens": BUDGET, "iterations": iterations})
    made = inputs(config)
    for (_, method), curves in made.curves.items():
        for seed, rows in curves.items():
            for row in rows:
                row["tokens"] -= 600.0 if method == "grpo_actfocus" else 0.0
            ended = 12 - (seed in "23") if method == "grpo_actfocus" else 10
            del rows[ended:]
            rows[-1]["validation_success"] = 0.5 + int(seed) / 100
    timings = {
        key: {seed: rows[: len(made.curves[key][seed])] for seed, rows in t.items()} for key, t in made.timings.items()
    }
    return config, replace(made, timings=timings)


def test_with_a_budget_unequal_lengths_are_no_fault_and_a_budget_not_spent_is() -> None:
    config, made = budgeted()
    found = compared(config, made)
    assert found["tokens"] == BUDGET
    assert not any("iterations" in warning for warning in found["warnings"] if "KL" not in warning)
    assert f"## lake, training to {BUDGET} sampled tokens" in comparison_markdown(found)
    assert "| `grpo_actfocus` | 11.5 | 1472 | " in comparison_markdown(found)

    config, made = budgeted(iterations=10)
    for curves in made.curves.values():
        for rows in curves.values():
            del rows[10:]
    made.curves["lake", "grpo"]["1"][0]["tokens"] -= 0.06 * BUDGET
    warnings = [w for w in compared(config, made)["warnings"] if "train.iterations" in w]
    assert [w.split(" sampled tokens")[0] for w in warnings] == [
        "lake: grpo: train.iterations (10) ended seed 1 after as few as 37676",
        "lake: grpo_actfocus: train.iterations (10) ended seeds 0, 1, 2, 3 after as few as 34000",
    ]


def test_with_a_budget_curves_are_over_tokens_and_end_where_each_seed_did() -> None:
    config, made = budgeted()
    curves = {method: found for (_, method), found in made.curves.items()}
    learning, health, gradient = training_charts(config, made, "lake", {})
    assert list(learning.views) == ["tokens", "iterations", "episodes", "seconds"]
    short = curves["grpo_actfocus"]
    ends = {
        "tokens": np.mean([sum(row["tokens"] for row in rows) for rows in short.values()]),
        "iterations": 11.5,
        "episodes": 11.5 * 128,
        "seconds": 23.0,
    }
    for cost, end in ends.items():
        traces = [t for t in learning.views[cost]["data"] if t.get("legendgroup") == "grpo_actfocus"]
        line, points = traces[1:]
        assert len(line["x"]) == 11
        assert (points["x"][-1], points["y"][-1]) == (pytest.approx(end, rel=1e-5), pytest.approx(0.515))
        assert len(points["x"]) == 1 + 2 + 1  # before, after 4 and 8 iterations, at the end
    whole = [t for t in learning.views["iterations"]["data"] if t.get("legendgroup") == "grpo"][2]
    assert whole["x"] == [0, 4, 8, 10]
    titles = {view["layout"]["xaxis"]["title"]["text"] for view in health.views.values()}
    assert titles == {"sampled tokens"}
    for chart in (learning, health, gradient):
        assert "what comes after the shortest one's last is left out" in chart.caption
        assert f"nearest to {BUDGET} sampled tokens (at most {config.train.iterations}) of 8 initial" in chart.caption

    assert learning_figure(curves, {}, BUDGET).axes[0].get_xlabel() == "sampled tokens"
    panels = learning_panels(curves, BUDGET)
    assert panels.get_supxlabel() == "sampled tokens"
    assert [len(np.asarray(line.get_xdata())) for line in panels.axes[0].lines[:3]] == [10, 11, 10]
    assert np.asarray(panels.axes[1].lines[-1].get_xdata())[-1] == pytest.approx(ends["tokens"])


def test_curves_of_equal_length_say_nothing_of_a_cut() -> None:
    config = configuration()
    assert not any("left out" in chart.caption for chart in training_charts(config, inputs(config), "lake", {}))


def test_missing_seeds_are_paired_without_and_said(tmp_path: Path) -> None:
    config = configuration()
    made = inputs(config)
    table = made.episodes["lake", "grpo"]
    shorter = table.filter(pa.array([seed != 3 for seed in table["seed"].to_pylist()]))
    found = compared(config, replace(made, episodes={**made.episodes, ("lake", "grpo"): shorter}))
    assert row_of(found, "grpo_actfocus")["difference_to_uniform_seeds"] == 3
    assert "lake: grpo_actfocus: only 3 of 4 seeds are paired with grpo" in found["warnings"]
    config = configuration(seeds=list(range(6)))
    made = inputs(config)
    table = made.episodes["lake", "grpo"]
    shorter = table.filter(pa.array([seed != 3 for seed in table["seed"].to_pylist()]))
    found = compared(config, replace(made, episodes={**made.episodes, ("lake", "grpo"): shorter}))
    assert (
        "lake: grpo_actfocus: only 5 of 6 seeds are paired with grpo: no verdict below 6 paired seeds"
        in (found["warnings"])
    )


def test_tables_print_sizes_intervals_and_common_terms_once() -> None:
    config = configuration()
    found = compared(config, inputs(config))
    markdown, text = comparison_markdown(found), comparison_text(found)
    regulariser = config.method_defaults.regulariser
    assert f"share the same entropy and KL terms: entropy bonus {regulariser.entropy:g}" in markdown
    assert markdown.count("entropy bonus") == 1
    assert markdown.count("## lake, temperature") == 2
    row = row_of(found, "grpo_actfocus")
    shown = f"{row['success_mean']:.3f} [{row['success_ci_low']:.3f}, {row['success_ci_high']:.3f}]"
    assert shown in markdown
    assert shown in text
    assert f"{row['difference_to_uniform']:+.3f} (4 seeds, " in text
    assert "success [95 % bootstrap interval over seeds and initial states]; differences [95 % t-interval" in text
    assert "4 × 8 × 3" in text
    lines = [line for line in markdown.split("\n") if line.startswith("|")]
    assert {line.count("|") for line in lines} == {18, 10}
    table = result_table(found, "lake", 1.0)
    assert all(len(cells) == len(table.header) for cells in table.rows)
    assert [cells[0] for cells in table.rows] == [*config.methods, REFERENCE]


def test_the_overview_has_a_row_per_comparison_and_the_reference_first() -> None:
    config = configuration()
    found = compared(config, inputs(config))
    fewer = {**found, "comparison": "few", "rows": [row for row in found["rows"] if row["method"] != "grpo"]}
    head, _, full, few = overview_markdown([found, fewer]).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names[:3] == ["comparison", "environment", REFERENCE]
    cells = dict(zip(names, (cell.strip() for cell in full.strip("|").split("|")), strict=True))
    row = row_of(found, "grpo")
    assert cells["grpo"] == f"{row['success_mean']:.3f} [{row['success_ci_low']:.3f}, {row['success_ci_high']:.3f}]"
    assert dict(zip(names, (cell.strip() for cell in few.strip("|").split("|")), strict=True))["grpo"] == "–"


def test_status_and_source_are_shown_where_a_method_has_a_source() -> None:
    methods = {"grpo": {"source": "arXiv 2402.03300", "status": "faithful"}, "mine": {}}
    config = configuration(methods=methods, compare={"resamples": 200, "uniform": {}, "control": {}})
    found = compared(config, inputs(config))
    lines = [line.split() for line in comparison_text(found).splitlines()]
    assert [line[1] for line in lines if line and line[0] in ("method", "grpo", "mine", REFERENCE)] == [
        "status", "faithful", "ours", "–"
    ]  # fmt: skip
    assert "| `grpo` | faithful | arXiv 2402.03300 |" in comparison_markdown(found)
    assert row_of(found, "grpo")["gradient_share_action"] == pytest.approx(RATES["grpo"] / 4)


def test_figures_are_equal_byte_for_byte_and_carry_no_date(tmp_path: Path) -> None:
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    first, second = (write_comparison_figures(found, made, tmp_path / name)["lake"] for name in ("a", "b"))
    assert [svg.name for svg in first] == ["lake-success.svg", "lake-learning.svg", "lake-health.svg"]
    for a, b in zip(first, second, strict=True):
        for suffix in (".svg", ".png"):
            drawn = a.with_suffix(suffix).read_bytes()
            assert drawn == b.with_suffix(suffix).read_bytes()
            assert b"dc:date" not in drawn


def test_learning_figure_shows_seconds_only_if_they_are_known() -> None:
    config = configuration()
    made = inputs(config)
    curves = {method: found for (_, method), found in made.curves.items()}
    timings = {method: found for (_, method), found in made.timings.items()}
    labels = [[axes.get_xlabel() for axes in learning_figure(curves, t).axes] for t in ({}, timings)]
    assert labels[0] == ["iterations", "episodes", "sampled tokens"]
    assert labels[1] == [*labels[0], "seconds of training"]


@pytest.mark.parametrize("count", [9, 12])
def test_many_methods_get_a_panel_each(count: int) -> None:
    curves = {f"method{n}": {"0": curve(0, 0.5 + n / 50, 0.01), "1": curve(1, 0.5, 0.01)} for n in range(count)}
    shown = [axes for axes in learning_panels(curves).axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == list(curves)
    for axes in shown:
        assert len(axes.lines) == count + 2  # everybody in grey, its own mean, its validations
        assert len(axes.collections) == 1


def test_learning_figure_puts_values_where_the_policy_was_made() -> None:
    config = configuration()
    curves = {"grpo": inputs(config).curves["lake", "grpo"]}
    episodes_panel = learning_figure(curves, {}).axes[1]
    line, points = episodes_panel.get_lines()
    assert np.asarray(line.get_xdata()).tolist() == [128.0 * i for i in range(ITERATIONS)]
    assert np.asarray(points.get_xdata()).tolist() == [0, 128.0 * 4, 128.0 * 8, 128.0 * 12]
    assert np.asarray(points.get_ydata())[0] == pytest.approx(0.3)


def test_figures_bear_single_seeds_gaps_and_many_methods(tmp_path: Path) -> None:
    config = configuration(seeds=[0], methods={f"method_{letter}": {} for letter in "abcdefgh"}, compare={})
    made = inputs(config)
    for row in made.curves["lake", "method_a"]["0"][3:5]:
        del row["gradient_norm"]
    found = compared(config, made)
    assert row_of(found, "method_a")["t_ci_low"] is None
    assert len(write_comparison_figures(found, made, tmp_path)["lake"]) == 3


def test_page_is_self_contained_and_escapes_what_it_is_given() -> None:
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    hostile = "<script>alert('x')</script>"
    found["comparison"] = hostile
    found["warnings"].append(hostile)
    correlation = {"spearman": 0.5, "ci_low": 0.4, "ci_high": None, "groups": 8}
    bottleneck = {"groups": 8, "group_size": 4, "zero_variance_groups": 2} | {
        scope: correlation | {"varying": correlation} for scope in ("action", "reasoning", "response")
    }
    roles = ("reasoning", "action", "think_tag", "answer_tag", "other")
    bottleneck |= {"energy_by_role": {role: {"count": 1} for role in roles}}
    figure = {"title": hostile, "caption": hostile, "plotly": {}}
    study = {"name": "s", "summary": hostile, "table": {"header": [hostile], "rows": [[hostile]]}, "verdict": [hostile]}
    page = report_html(config, found, made, {"lake": bottleneck}, sweeps=[{**study, "figures": [figure]}])
    assert hostile not in page
    # title, heading, warning; summary, table's head and cell, verdict; the figure's title, label, title again, caption
    assert page.count("&lt;script&gt;") == 11
    assert not re.search("<(?:link|iframe|object|embed)", page)
    assert not re.search("<(?:script|img)[^>]* src", page)
    (allowed,) = re.findall('Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in html.unescape(allowed)
    scripts = re.findall('<script(?: type="text/plain" id="plotly")?>(.*?)</script>', page, flags=re.S)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert [f"'sha256-{digest}'" in html.unescape(allowed) for digest in digests] == [
        True
    ] * 5  # four of the page, and plotly
    assert "[+0.400, undefined], n = 8" in page
    assert "Action Bottleneck" not in report_html(config, found, made)


def test_page_has_no_link_out_of_it_and_its_charts_are_sent_nowhere() -> None:
    config = configuration()
    made = inputs(config)
    page = report_html(config, compared(config, made), made)
    own, _, _ = page.partition('<script type="text/plain" id="plotly">')
    assert {link[0] for link in re.findall(r"""(?:href|src|action|ping|data)=["']([^"']*)""", own)} == {"#"}
    assert set(re.findall(r"https?://[\w.]+", own)) == {"http://www.w3.org"}  # the name of SVG's elements
    drawn = re.findall(r"Plotly\.\w+\([^;]*;", own)
    assert len(drawn) == 1
    assert "showSendToCloud: false" in drawn[0]
    assert 'plotlyServerURL: ""' in drawn[0]


def test_what_is_embedded_cannot_leave_its_element() -> None:
    hostile = {"text": "</script><!--<script>\u2028\u2029&amp;'\"\\", "number": 0.5, "none": None}
    text = embedded(hostile)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == hostile
    with pytest.raises(ValueError, match="JSON"):
        embedded(float("nan"))


def test_plotly_is_given_texts_and_no_markup_but_line_breaks() -> None:
    figure = {
        "data": [
            {"name": '<a href="x">n</a>', "hovertemplate": "%{x}<br>a & b<extra></extra>", "x": ["<b style='x'>"]}
        ],
        "layout": {"title": {"text": "<span style='a'>t</span>"}, "template": {}, "images": [{"source": "http://x"}]},
    }
    made = plain(figure)
    assert made["data"][0]["name"] == '&lt;a href="x"&gt;n&lt;/a&gt;'
    assert made["data"][0]["hovertemplate"] == "%{x}<br>a &amp; b<extra></extra>"
    assert made["data"][0]["x"] == ["&lt;b style='x'&gt;"]
    assert made["layout"] == {"title": {"text": "&lt;span style='a'&gt;t&lt;/span&gt;"}}


def test_charts_hold_the_comparisons_numbers_and_say_what_was_run() -> None:
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    row = row_of(found, "grpo_actfocus")
    differences, improvement = difference_charts(config, found, "lake")
    assert list(differences.views) == ["0.5 (headline)", "1"]
    texts = [t["text"][0] for t in differences.views["0.5 (headline)"]["data"] if "text" in t]
    assert texts[0].startswith(f"grpo_actfocus − grpo_lr_matched: {row['difference_to_control']:+.3f} (4 seeds, ")
    assert texts[1].startswith(f"grpo_actfocus − grpo: {row['difference_to_uniform']:+.3f} (4 seeds, ")
    assert [text.split(":")[0] for text in texts[2:]] == [f"{method} − reference" for method in config.methods]
    (text,) = [t["text"][0] for t in improvement.views["1"]["data"] if t["mode"] == "markers"]
    later = row_of(found, "grpo_actfocus", 1.0)
    assert text == f"grpo_actfocus over grpo: {later['probability_of_improvement']:.3f}"
    assert "4 seeds per method" in differences.caption
    assert "8 held-out initial states × 3 episodes" in differences.caption

    tokens = {"action": 1, "reasoning": 2, "tag": 1, "other": 0}
    learning, health, gradient = training_charts(config, made, "lake", tokens)
    assert list(learning.views) == ["iterations", "episodes", "tokens", "seconds"]
    points = next(t for t in learning.views["episodes"]["data"] if t["mode"] == "markers")
    assert points["x"] == [0, 128 * 4, 128 * 8, 128 * 12]
    assert len(health.views) == 6
    counted = {
        t["name"]: dict(zip(t["customdata"], t["x"], strict=True)) for t in gradient.views["of |c A|, counted"]["data"]
    }
    assert counted["reasoning"]["all response tokens"] == 0.5
    assert counted["action"]["grpo"] == pytest.approx(RATES["grpo"] / 2)
    assert f"{config.train.iterations} iterations" in gradient.caption
    assert list(next(iter(training_charts(config, replace(made, timings={}), "lake", {}))).views) == [
        "iterations", "episodes", "tokens",
    ]  # fmt: skip


def test_report_code_does_not_load_the_training_stack() -> None:
    code = (
        "import sys, json, pipeline.report.html, pipeline.analysis.statistics;"
        "print(json.dumps([m for m in ('torch', 'lightning', 'mlflow', 'matplotlib.pyplot') if m in sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == []
