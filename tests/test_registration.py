"""Said before, shown after: what is registered, what has changed since, and what the report says of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.registration import declaration, journal, register
from pipeline.report.declared import (
    exclusion_lines,
    look_line,
    registration_foot,
    registration_lines,
    registration_warning,
)
from pipeline.sources.seeds_in_effect import in_effect
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.yaml_files import read_yaml
from tests.comparison_cases import compared, configuration, inputs
from tests.looks_cases import UNTIL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "hypotheses.yaml"


def test_the_first_run_writes_what_is_declared_and_later_ones_leave_it(file: Path) -> None:
    config = configuration(seeds=UNTIL)
    found = register(config, file)
    before = file.read_bytes()
    assert found == {"sha256": hashlib.sha256(before).hexdigest(), "changes": []}
    assert read_yaml(file) == declaration(config)
    assert read_yaml(file)["primary"] == "grpo_actfocus"
    assert read_yaml(file)["seeds"] == UNTIL
    changed = configuration(
        seeds=UNTIL,
        compare={"uniform": {"grpo_actfocus": "grpo"}, "smallest_effect": 0.2},
        evaluation={"states": 8, "rollouts": 3, "temperatures": [1.0]},
    )
    again = register(changed, file)
    assert file.read_bytes() == before
    assert again["sha256"] == found["sha256"]
    assert [change["field"] for change in again["changes"]] == ["control", "smallest_effect", "headline"]
    line = registration_warning(again)
    assert line is not None
    assert "smallest_effect 0.05 → 0.2" in line
    assert "temperature 0.5" in line
    assert registration_warning(found) is None


def test_seeds_that_are_added_are_no_change(file: Path) -> None:
    register(configuration(seeds=UNTIL), file)
    assert register(in_effect(configuration(seeds=UNTIL), 14), file)["changes"] == []
    (change,) = register(configuration(seeds=[0, 1]), file)["changes"]
    assert (change["field"], change["now"]) == ("seeds", [0, 1])


def test_a_file_that_is_no_registration_is_one_line(file: Path) -> None:
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="must be a mapping, as the first run writes it; delete it to register anew"):
        register(configuration(), file)


def test_every_later_change_is_dated_and_says_whether_test_states_had_been_played(file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "registration.json"

    def seen(opened: bool, at: str, **changes: Any) -> list[dict[str, Any]]:
        entries = journal(register(configuration(**changes), file), kept, opened, at)
        write_json(kept, entries)
        return entries

    pair: dict[str, Any] = {"uniform": {"grpo_actfocus": "grpo"}, "control": {"grpo_actfocus": "grpo_lr_matched"}}
    assert len(seen(False, "2026-01-01T10:00:00+00:00")) == 1
    assert len(seen(True, "2026-01-02T10:00:00+00:00")) == 1, "nothing has changed"
    seen(True, "2026-01-03T10:00:00+00:00", compare={**pair, "family": "screening"})
    entries = seen(True, "2026-01-04T10:00:00+00:00")
    file.write_text(file.read_text().replace("smallest_effect: 0.05", "smallest_effect: 0.01"))
    entries = seen(True, "2026-01-05T10:00:00+00:00")
    first, changed, *dated = registration_lines(entries[-1], entries)
    assert first.startswith(
        f"Registered in hypotheses.yaml, SHA-256 {entries[-1]['sha256'][:12]}, first seen 2026-01-01"
    )
    assert "had been played before" not in first
    assert changed == "- smallest_effect 0.01 → 0.05"
    assert dated == [
        "- 2026-01-03: the params file was changed, after test states had been played; other than registered: family",
        "- 2026-01-04: the params file was changed, after test states had been played; other than registered: nothing",
        "- 2026-01-05: hypotheses.yaml was rewritten, after test states had been played; other than registered: smallest_effect",
    ]


def test_a_registration_after_the_fact_says_so() -> None:
    found = {"sha256": "0" * 64, "changes": []}
    entry = {**found, "at": "2026-01-01T10:00:00+00:00", "opened": True}
    assert registration_lines(found, [entry], "2026-02-01") == [
        "Registered in hypotheses.yaml, SHA-256 000000000000, committed 2026-02-01; test states had been played before. "
        "Nothing has changed since."
    ]
    assert registration_lines(found) == [
        "Registered in hypotheses.yaml, SHA-256 000000000000. Nothing has changed since."
    ]
    assert registration_lines(None) == []


def test_an_excluded_training_is_left_out_of_its_pairs_and_told() -> None:
    out = {"environment": "lake", "method": "grpo", "seed": 1, "reason": "the disk was full"}
    pair: dict[str, Any] = {"uniform": {"grpo_actfocus": "grpo"}, "control": {"grpo_actfocus": "grpo_lr_matched"}}
    config = configuration(compare={**pair, "exclusions": [out]})
    comparison = compared(config, inputs(config))
    seeds = {one["kind"]: len(one["by_seed"]) for one in comparison["hypotheses"]}
    assert seeds == {"uniform": 3, "control": 4}
    assert exclusion_lines(comparison) == ["Left out: lake, grpo, seed 1: the disk was full"]
    (row,) = [r for r in comparison["rows"] if r["method"] == "grpo_actfocus" and not r["headline"]]
    assert (row["difference_to_uniform_seeds"], row["difference_to_control_seeds"], row["seeds"]) == (3, 4, 4)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("environment", "lakes", "compare.exclusions.0.environment: 'lakes' is not there; did you mean 'lake'?"),
        ("method", "nothing", "compare.exclusions.0.method: 'nothing' is not there; "),
        ("seed", 77, "compare.exclusions.0.seed: 77 is not there; allowed: 0, 1, 2, 3"),
        ("reason", "", "compare.exclusions.0.reason: string should have at least 1 character"),
    ],
)
def test_an_exclusion_of_what_is_not_there_is_refused(key: str, value: Any, line: str) -> None:
    out = {"environment": "lake", "method": "grpo", "seed": 1, "reason": "the disk was full", key: value}
    with pytest.raises(UserError) as error:
        configuration(compare={"exclusions": [out]})
    assert line in str(error.value)


def test_a_comparison_says_at_which_look_it_stands() -> None:
    config = configuration(seeds=UNTIL)
    comparison = compared(config, inputs(config))
    assert comparison["look"]["seeds"] == 6
    line = look_line(comparison)
    assert (
        line
        == "Look 1 of 7: 6 of at most 30 seeds, too few for any verdict. Not decided yet: `make repro` adds 4 seeds."
    )
    assert {one["verdict"] for one in comparison["hypotheses"]} == {None}
    config = config.model_copy(update={"seeds": list(range(10))})
    comparison = compared(config, inputs(config))
    assert comparison["hypotheses"][0]["verdict"] == "better"
    assert look_line(comparison) == "Look 2 of 7: 10 of at most 30 seeds, judged at 0.96%. Decided."
    assert look_line(compared(configuration(), inputs(configuration()))) is None


def test_the_reports_foot_has_the_date_of_the_commit_that_registered(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        dated = {**os.environ, "GIT_COMMITTER_DATE": "2026-03-04T12:00:00+00:00"}
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, env=dated, check=True)

    layout = Layout(tmp_path)
    comparison = {"registration": register(configuration(), layout.hypotheses)}
    write_json(layout.registered, journal(comparison["registration"], layout.registered, False, "2026-01-01T10:00:00"))
    git("init", "-q")
    assert "first seen 2026-01-01, in no commit. " in registration_foot(comparison, layout)[0]
    git("add", "hypotheses.yaml")
    git("commit", "-qm", "registered")
    assert ", committed 2026-03-04. Nothing has changed since." in registration_foot(comparison, layout)[0]
    layout.hypotheses.write_text("{}\n")
    assert "in no commit" in registration_foot(comparison, layout)[0]
