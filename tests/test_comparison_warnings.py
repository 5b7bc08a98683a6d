"""What a comparison warns of, and budgets of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis.comparison import Inputs
from pipeline.report.comparison_figures import learning_figure, learning_panels
from pipeline.report.comparison_tables import (
    common_terms,
    comparison_markdown,
)
from pipeline.report.curve_charts import training_charts
from pipeline.settings.params import Config
from pipeline.workspace.yaml_files import read_yaml
from tests.comparison_cases import ITERATIONS, ROOT, compared, configuration, inputs, row_of


def test_drift_of_a_control_is_warned_of_beyond_a_tenth() -> None:
    config = configuration()
    assert not any("KL per update" in warning for warning in compared(config, inputs(config, 0.0109))["warnings"])
    for drifted in (0.0111, 0.0089):
        (warning,) = [w for w in compared(config, inputs(config, drifted))["warnings"] if "KL per update" in w]
        assert "lake: grpo_actfocus: KL per update on action tokens" in warning
        assert warning.endswith("a control with `matched_to: grpo_actfocus` has a learning rate that is found")


def test_other_warnings() -> None:
    config = configuration(
        methods={"grpo": {}, "grpo_actfocus": {"regulariser": {"kind": "fixed", "entropy": 0.5, "kl": 0.0}}},
        compare={"uniform": {"grpo_actfocus": "grpo"}},
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
    config = configuration(seeds=list(range(7)))
    made = inputs(config)
    table = made.episodes["lake", "grpo"]
    shorter = table.filter(pa.array([seed != 3 for seed in table["seed"].to_pylist()]))
    found = compared(config, replace(made, episodes={**made.episodes, ("lake", "grpo"): shorter}))
    few = next(warning for warning in found["warnings"] if "verdict" in warning)
    assert few.startswith(
        "lake: grpo_actfocus: as few as 6 paired seeds: no verdict below 7 paired seeds: give `seeds` 7 "
    )
    assert [one["verdict"] is None for one in found["hypotheses"]] == [True, False]
