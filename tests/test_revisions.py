"""Two revisions beside each other, and the flat files that DVC reads."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.analysis.metrics import CURVES, curves_csv, headline_metrics, write_metrics
from pipeline.analysis.revisions import Revision, changed_settings, changes
from pipeline.report.revisions import revisions_text

SUCCESS = {"a": [[1, 0], [1, 1]], "b": [[0, 0], [1, 0]]}
"""Revision -> success by seed and initial state."""


def episodes(success: list[list[int]], seeds: tuple[int, ...] = (0, 1)) -> pa.Table:
    rows = [
        {
            "environment": "lake",
            "method": "grpo",
            "temperature": 0.5,
            "seed": seed,
            "state": f"state {state}",
            "rollout": 0,
            "success": bool(value),
        }
        for seed, values in zip(seeds, success, strict=True)
        for state, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows)


def row(method: str, mean: float, **changes: Any) -> dict[str, Any]:
    keys = ("return_mean", "valid_action_rate", "collapsed_seeds")
    uniform = [f"difference_to_uniform{end}" for end in ("", "_ci_low", "_ci_high")]
    return {
        **dict.fromkeys((*keys, *uniform)),
        "environment": "lake",
        "method": method,
        "temperature": 0.5,
        "headline": True,
        "success_mean": mean,
        "success_ci_low": mean - 0.1,
        "success_ci_high": mean + 0.1,
        **changes,
    }


def revision(name: str, table: pa.Table | None = None, **changes: Any) -> Revision:
    cells = [value for seed in SUCCESS[name] for value in seed]
    rows = [row("grpo", sum(cells) / len(cells), **changes), row("grpo", 0.9, temperature=1.0, headline=False)]
    tables = {("lake", "grpo"): episodes(SUCCESS[name]) if table is None else table}
    return Revision(name, {"train": {"iterations": 3}}, {"rows": rows}, tables)


def test_a_difference_is_paired_over_common_seeds_and_states() -> None:
    found = changes(revision("a"), revision("b"))["lake", "grpo"]
    assert found.value == pytest.approx(0.25 - 0.75)
    assert found.paired is not None
    assert (found.paired.by_seed, found.states) == ((-0.5, -0.5), 2)
    one_seed = revision("b", episodes([SUCCESS["b"][1]], (1,)))
    found = changes(revision("a"), one_seed)["lake", "grpo"]
    assert found.paired is not None
    assert (found.value, len(found.paired.by_seed)) == (pytest.approx(0.5 - 1.0), 1)


def test_a_verdict_on_two_revisions_needs_six_common_seeds() -> None:
    worse, better = [[0, 0, 0, 1]] * 7, [[1, 1, 1, 0], *[[1, 1, 1, 1]] * 6]
    seven = revision("a", episodes(worse, tuple(range(7))))
    text = revisions_text(seven, revision("b", episodes(better, tuple(range(7)))))
    found = re.search(r"\+0\.714 \[\+0\.\d+, \+\d\.\d+\] p_adj 0\.0\d+: better  7 seeds × 4 states", text)
    assert found or "undecided" in text, text
    text = revisions_text(seven, revision("b", episodes(better, tuple(range(2, 9)))))
    assert re.search(r"\+0\.700 \[[^]]*\] p_adj 0\.\d+  5 seeds × 4 states", text)
    assert "no verdict below 6 paired seeds: give `seeds` 6 or more in both revisions, the same ones: grpo" in text
    assert "better" not in text


@pytest.mark.parametrize("what", ["no episodes", "no common seed", "another temperature"])
def test_what_cannot_be_paired_has_no_interval_and_says_so(what: str) -> None:
    a, b = revision("a"), revision("b")
    if what == "no episodes":
        b = Revision("b", b.params, b.comparison, {})
    elif what == "no common seed":
        b = revision("b", episodes(SUCCESS["b"], (7, 8)))
    else:
        b = revision("b", temperature=0.7)
    found = changes(a, b)["lake", "grpo"]
    assert (found.value, found.paired) == (pytest.approx(-0.5), None)
    text = revisions_text(a, b)
    assert "-0.500  " in text
    assert "not paired, a difference of means without a verdict: grpo" in text


def test_changed_settings_are_named_with_both_values() -> None:
    a = {"train": {"iterations": 3, "passes": 1}, "seeds": [0, 1], "methods": {"grpo": {}}}
    b = {"train": {"iterations": 5, "passes": 1}, "seeds": [0], "methods": {"grpo": {}, "ppo": {"learning_rate": 1e-3}}}
    assert changed_settings(a, b) == [
        ("methods.ppo.learning_rate", "–", "0.001"),
        ("seeds", "[0, 1]", "[0]"),
        ("train.iterations", "3", "5"),
    ]
    assert changed_settings(a, a) == []


def test_metrics_are_those_of_the_headline_and_leave_out_what_does_not_apply(tmp_path: Path) -> None:
    comparison = revision("a").comparison
    found = headline_metrics(comparison)
    assert found["lake"]["grpo"]["success"] == 0.75
    assert "difference_to_uniform" not in found["lake"]["grpo"]
    curves = {("lake", "grpo"): {"0": [{"success": 0.5}], "1": [{"success": 1.0}, {"success": 0.25}]}}
    stale = tmp_path / "metrics" / "lake" / "ppo.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    write_metrics(comparison, curves, tmp_path)
    assert not stale.exists()
    assert json.loads((tmp_path / "metrics/lake/grpo.json").read_text()) == found["lake"]["grpo"]
    assert (tmp_path / "plots/curves.csv").read_text() == curves_csv(curves)


def test_curves_are_means_over_the_seeds_that_have_them() -> None:
    curves = {("lake", "grpo"): {"0": [{"success": 0.5}], "1": [{"success": 1.0}, {"success": 1 / 3}]}}
    rows = list(csv.DictReader(io.StringIO(curves_csv(curves))))
    assert list(rows[0]) == ["environment", "method", "iteration", "seeds", *CURVES]
    assert [(r["iteration"], r["seeds"], r["success"]) for r in rows] == [("0", "2", "0.75"), ("1", "1", "0.333333")]
    assert {r["kl_reference"] for r in rows} == {""}
