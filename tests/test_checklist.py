"""The checklist for credit-assignment claims, filled from the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.report.checklist import ELSEWHERE, UNKNOWN, checklist_tables, policy_size
from pipeline.report.comparison_tables import comparison_markdown
from pipeline.settings.params import Config
from tests.comparison_cases import ITERATIONS, compared, configuration, inputs, row_of


def items(config: Config, timed: bool = False, parameters: int | None = 10, **changes: Any) -> dict[str, str]:
    made = inputs(config)
    found = {**compared(config, made), **changes}
    return {row[0]: row[1] for row in checklist_tables(config, found, made, parameters, timed)[0].rows}


def test_the_run_fills_the_items() -> None:
    config = configuration()
    filled = items(config)
    assert filled["Base model"].endswith("10 parameters, seed 0")
    assert filled["Episode-level baseline on the same model"] == "grpo, grpo_lr_matched"
    assert filled["Ablation of the credit alone (r)"] == "grpo_actfocus: grpo"
    assert filled["Controls of step size"] == "grpo_actfocus: grpo_lr_matched"
    assert "8 test states × 3 episodes, 32 validation states" in filled["Benchmarks and splits"]
    assert filled["Seeds"] == "0, 1, 2, 3"
    assert filled["Mean length of an episode"] == "lake 50.0 tokens"
    assert filled["Shortest, median and longest (r)"] == "lake 50, 50, 50 tokens"
    assert filled["Extra cost of credit (r)"] == "grpo_actfocus: the signal reference_energy of every sampled token"
    assert "equal iterations" in filled["Compute of the compared methods"]
    assert filled["GPU hours"].startswith("not measured")


def test_what_is_missing_is_named() -> None:
    config = configuration(compare={})
    filled = items(config, parameters=None)
    assert f"size {UNKNOWN}" in filled["Base model"]
    assert filled["Controls of step size"] == "none: compare.control is empty"
    assert filled["Is reasoning used"] == f"lake: {UNKNOWN}"
    assert items(config, interventions={"lake": {"used": True}})["Is reasoning used"] == "lake: yes"


def test_wall_clock_stands_only_where_equal_runs_may_differ() -> None:
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    slower = replace(made, timings={key: {"0": [{"seconds": 7200.0}]} for key in made.timings})
    quiet, again = (checklist_tables(config, found, each, 10, timed=False) for each in (made, slower))
    assert quiet == again
    assert dict(quiet[0].rows)["CPU hours"] == ELSEWHERE
    assert comparison_markdown(found, quiet).endswith("|\n")
    _, methods = checklist_tables(config, found, slower, 10, timed=True)
    assert methods.header[-1] == "hours of a training"
    assert {row[-1] for row in methods.rows} == {"2"}
    _, methods = checklist_tables(config, found, replace(made, timings={}), 10, timed=True)
    assert {row[-1] for row in methods.rows} == {UNKNOWN}


def test_each_method_says_its_credit_step_size_and_spread() -> None:
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    found["rows"] = [
        {**row, "matched": {"matched_to": "grpo_actfocus", "off": 0.05}} if row["method"] == "grpo_lr_matched" else row
        for row in found["rows"]
    ]
    _, methods = checklist_tables(config, found, made, 10, timed=False)
    rows = {row[0]: dict(zip(methods.header, row, strict=True)) for row in methods.rows}
    assert list(rows) == list(config.methods)
    assert rows["grpo_actfocus"]["credit"].endswith("(advantage group); weights actfocus per token")
    assert rows["grpo"]["chosen"] == "given"
    assert rows["grpo_lr_matched"]["chosen"] == "matched to grpo_actfocus, off by 5.0%"
    seeds = row_of(found, "grpo")["seed_success"]
    assert rows["grpo"]["success, sd over seeds"] == f"{np.mean(seeds):.3f}, {np.std(seeds, ddof=1):.3f}"
    assert rows["grpo"]["sampled tokens"] == str(ITERATIONS * 4015)


def test_a_policys_size_is_read_from_its_weights(tmp_path: Path) -> None:
    assert policy_size(tmp_path) is None
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}, tmp_path / "model.safetensors")
    assert policy_size(tmp_path) == 17


@pytest.mark.parametrize("length", [1])
def test_one_seed_has_no_spread(length: int) -> None:
    config = configuration(seeds=list(range(length)), compare={})
    made = inputs(config)
    _, methods = checklist_tables(config, compared(config, made), made, 10, timed=False)
    assert all(row[4].endswith(f", {UNKNOWN}") for row in methods.rows)
