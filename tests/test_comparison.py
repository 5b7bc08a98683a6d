"""The comparison on small made-up results: rows worked out by hand, warnings, tables, figures and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis.comparison import REFERENCE, SPENT, Inputs, read_inputs
from pipeline.analysis.metrics import headline_metrics
from pipeline.report.comparison_tables import comparison_markdown, result_table
from pipeline.settings.params import Config
from pipeline.trajectories.results import write_results
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json, write_record
from pipeline.workspace.layout import Layout
from tests.comparison_cases import ITERATIONS, compared, configuration, inputs, row_of

KEYS = """environment method temperature headline seeds states episodes success_mean success_iqm success_ci_low
    success_ci_high reference_success reference_ci_low reference_ci_high difference_to_reference
    difference_to_reference_ci_low difference_to_reference_ci_high uniform difference_to_uniform
    difference_to_uniform_ci_low difference_to_uniform_ci_high probability_of_improvement
    difference_to_reference_by_seed difference_to_uniform_by_seed difference_to_control_by_seed control difference_to_control
    difference_to_control_ci_low difference_to_control_ci_high return_mean action_token_share valid_action_rate
    disallowed_rate malformed_rate cut_rate truncated_rate iterations kl_update_action_first3 learning_rate matched regulariser collapsed_seeds non_finite_losses
    gradient_share_action status source training_episodes training_tokens paths_per_state"""


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
    assert row["kl_update_action_first3"] == pytest.approx(0.02)  # 0.01 * (1 + 2 + 3) / 3
    assert (row["iterations"], row["collapsed_seeds"], row["non_finite_losses"]) == (ITERATIONS, 0, 0)
    assert row_of(found, "grpo")["collapsed_seeds"] == 1  # seed 0 has 0.25, below 0.5
    assert row_of(found, "grpo_lr_matched")["learning_rate"] == 3e-7
    assert (row["success_ci_low"], row["success_ci_high"]) == (0.0, 1.0)  # cut off at the ends of a rate


MATCHING = {
    "matched_to": "grpo_actfocus",
    "seeds": [0, 1],
    "learning_rate": 7e-4,
    "wanted": 0.01,
    "found": 0.0112,
    "off": 0.12,
    "tries": [{"learning_rate": 7e-4, "kl_update_action": 0.0112}],
}


def test_a_row_says_how_its_learning_rate_was_found_and_a_warning_that_it_is_off() -> None:
    config = configuration()
    made = replace(inputs(config), matchings={("lake", "grpo_lr_matched"): MATCHING})
    found = compared(config, made)
    row = row_of(found, "grpo_lr_matched")
    assert (row["matched"], row["learning_rate"]) == (MATCHING, 7e-4)
    assert (row_of(found, "grpo")["matched"], row_of(found, "reference")["matched"]) == (None, None)
    assert "| 0.0007 (matched to grpo_actfocus: 12.0% off) |" in comparison_markdown(found)
    said = "lake: grpo_lr_matched: at no learning rate that was tried does an update move action tokens as one of grpo_actfocus"
    (warning,) = [warning for warning in found["warnings"] if warning.startswith(said)]
    assert warning.endswith("KL 0.0112 at 0.0007, 12% off 0.01")
    close = replace(made, matchings={("lake", "grpo_lr_matched"): {**MATCHING, "off": 0.1}})
    assert not any(warning.startswith(said) for warning in compared(config, close)["warnings"])


def test_every_row_has_every_key_and_the_reference_has_rows_of_its_own() -> None:
    config = configuration()
    found = compared(config, inputs(config))
    assert (found["schema"], found["comparison"]) == (3, "toy")
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
        write_results(table, layout.evaluations(environment, method))
    for (environment, method), curves in made.curves.items():
        write_record(layout.curves(environment, method), {"seeds": curves})
    write_record(layout.timings("lake", "grpo"), {"seeds": made.timings["lake", "grpo"]})
    found = read_inputs(config, layout)
    assert set(found.timings) == {("lake", "grpo")}
    assert compared(config, found) == compared(config, made)
