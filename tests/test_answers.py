"""What is said first of a comparison: a sentence per declared comparison, who reached most, at what cost, and the picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.comparison import headline
from pipeline.report.answer_figures import answer_chart, answer_figure, write_answer_figure
from pipeline.report.answers import answers, costs_text, leader_text, notes, opening, reasoning_texts
from pipeline.report.comparison_tables import comparison_markdown, comparison_text
from pipeline.report.html import report_html
from tests.answer_cases import answered, hypothesis
from tests.comparison_cases import compared, configuration, inputs


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    config = configuration()
    return compared(config, inputs(config))


def said(found: dict[str, Any], *declared: dict[str, Any], size: int | None = None) -> list[str]:
    return [answer.text for answer in answers(answered(found, *declared, size=size))]


def test_each_verdict_is_a_sentence_with_its_numbers(found: dict[str, Any]) -> None:
    mine, other = (headline(found)["lake"][name]["success_mean"] for name in ("grpo_actfocus", "grpo"))
    success = f"Success {mine:.3f} against {other:.3f}, a difference of"
    (better,) = said(found, hypothesis("better"), size=4)
    assert better == (
        f"On lake, grpo_actfocus is better than grpo (its uniform counterpart). {success} +0.080 (95 % interval +0.030 to "
        "+0.120; p = 0.004, corrected for 4 comparisons; 10 seeds)."
    )
    (worse,) = said(found, hypothesis("worse", p_adjusted=0.0001))
    assert worse.startswith(f"On lake, grpo_actfocus is worse than grpo (its uniform counterpart). {success} -0.080 (")
    assert "; p < 0.001; 10 seeds)." in worse
    (equal,) = said(found, hypothesis("equivalent"))
    assert equal.startswith("On lake, grpo_actfocus and grpo (its uniform counterpart) are equivalent, within ±0.05. ")
    assert "; p = 0.012 that it is larger than ±0.05; 10 seeds)." in equal
    (undecided,) = said(found, hypothesis("undecided"))
    assert undecided.startswith(
        "On lake, grpo_actfocus cannot be told apart from grpo (its uniform counterpart): undecided. "
    )
    assert undecided.endswith(
        "This run could have seen a difference of 0.06 with 80 % power; about 24 seeds would decide it."
    )


def test_what_cannot_be_decided_by_seeds_says_how_many_states_it_takes(found: dict[str, Any]) -> None:
    (text,) = said(found, hypothesis("undecided", seeds_needed=None, states_needed=300, detectable=None))
    assert text.endswith("10 seeds). About 300 test states would decide it, more seeds alone would not.")


def test_without_a_verdict_the_reason_and_the_remedy_are_said(found: dict[str, Any]) -> None:
    (text,) = said(found, hypothesis(None))
    assert "grpo_actfocus against grpo (its uniform counterpart): no verdict. " in text
    assert "a difference of +0.030 (1 seed). No verdict below 6 paired seeds: give `seeds` 6 or more." in text
    (two,) = said(found, hypothesis(None, seeds=2, by_seed=[0.01, 0.05]))
    assert "(over single seeds +0.010 to +0.050; 2 seeds)" in two


def test_the_level_is_the_one_that_was_used(found: dict[str, Any]) -> None:
    (text,) = said(found, hypothesis(level=0.988))
    assert "(98.8 % interval +0.030 to" in text
    chart = answer_chart(answered(found, hypothesis(level=0.988)))
    assert chart is not None
    assert "Line: 98.8 % interval" in chart.caption


@pytest.mark.parametrize(
    ("off", "role"),
    [
        (0.024, "its matched control: moves action tokens as far per update, within 2.4 %"),
        (-0.773, "its control, which is not matched: 77.3 % off in how far an update moves action tokens"),
    ],
)
def test_a_matched_control_says_how_near_it_is(found: dict[str, Any], off: float, role: str) -> None:
    rows = [
        {**row, "matched": {"matched_to": "grpo_actfocus", "off": off}} if row["method"] == "grpo_lr_matched" else row
        for row in found["rows"]
    ]
    (text,) = said({**found, "rows": rows}, hypothesis(kind="control", against="grpo_lr_matched"))
    assert f"({role})" in text


def test_the_primary_methods_answers_come_first(found: dict[str, Any]) -> None:
    other = hypothesis("worse", method="grpo_lr_matched", primary=False)
    texts = said(found, other, hypothesis("better"))
    assert ["is better" in text for text in texts] == [True, False]


def test_without_anything_declared_nothing_is_called_tested() -> None:
    config = configuration(compare={})
    nothing = compared(config, inputs(config))
    lines = opening(nothing)
    assert lines[0].startswith("No comparison was declared")
    assert lines[1].startswith("Highest success of 3 methods on lake: grpo_actfocus with ")
    assert answer_chart(nothing) is None
    assert answer_figure(nothing) is None


def test_the_leader_is_the_method_with_the_highest_success(found: dict[str, Any]) -> None:
    row = headline(found)["lake"]["grpo_actfocus"]
    text = leader_text(found, "lake")
    assert (
        f"grpo_actfocus with {row['success_mean']:.3f}; the reference policy has {row['reference_success']:.3f}" in text
    )
    assert f"({row['difference_to_reference']:+.3f}, 95 % interval" in text


def test_costs_name_methods_only_where_they_differ(found: dict[str, Any]) -> None:
    alike = answered(found, hypothesis())
    assert costs_text(alike, "lake", {}) == "Cost of one training on lake: 48 thousand sampled tokens each."
    minutes = {("lake", "grpo"): 6.0, ("lake", "grpo_actfocus"): 9.0}
    assert costs_text(alike, "lake", minutes).endswith(
        "each, 9.0 minutes of wall clock (grpo_actfocus), 6.0 minutes of wall clock (grpo)."
    )


@pytest.mark.parametrize(
    ("used", "words"), [(True, "without it success falls from 0.590 to 0.120"), (False, "means little")]
)
def test_whether_reasoning_is_used_is_said(found: dict[str, Any], used: bool, words: str) -> None:
    shown = {"own": {"success": 0.59}, "none": {"success": 0.12}, "other": {"success": 0.15}}
    told = {**found, "interventions": {"lake": {"used": used, "temperatures": [shown]}}}
    (text,) = reasoning_texts(told)
    assert words in text
    assert text in opening(told)
    assert reasoning_texts(found) == []


def test_notes_say_what_is_estimated_and_how_large_the_family_is(found: dict[str, Any]) -> None:
    one, two = (answered(found, *[hypothesis()] * count) for count in (1, 2))
    assert found["estimand"] in notes(one)[0]
    assert notes(one)[1].startswith("1 comparison declared; p values after Holm's correction")
    assert notes(two)[1].startswith("2 comparisons declared;")
    assert "within ±0.05 count as none" in notes(two)[1]


def test_sentences_precede_every_table_and_warnings_precede_the_rest() -> None:
    config = configuration(seeds=[0, 1])
    made = inputs(config)
    found = compared(config, made)
    claim = answers(found)[0].claim
    page = report_html(config, found, made)
    assert page.index(claim) < page.index("Highest success") < page.index('data-chart="answers"') < page.index("<table")
    assert page.index("Cost of one training") < page.index("Before you believe it") < page.index("<table")
    text, markdown = comparison_text(found), comparison_markdown(found)
    assert text.startswith(claim[:40])
    before, _, _ = text.partition("\n\n")
    assert "Highest success" in before
    assert "minutes of wall clock" not in text
    assert text.index("[95 % interval over") < text.index("warning: ")
    assert markdown.index(claim) < markdown.index("| method |") < markdown.index("**Warnings**")
    assert markdown.index("**Warnings**") < markdown.index("seeds × states × episodes")
    assert "minutes of wall clock" in comparison_text(found, {("lake", name): 2.0 for name in config.methods})


def test_where_looks_and_registration_stand_is_below_the_answers() -> None:
    config = configuration(seeds=list(range(8)))
    made = inputs(config)
    look = {"number": 1, "of": 3, "seeds": 8, "at_most": 24, "decided": False, "level": 0.01, "next_seeds": 16}
    registration = {"sha256": "ab" * 32, "changes": [{"field": "family", "registered": "holm", "now": "screening"}]}
    found = {**compared(config, made), "look": look, "registration": registration}
    page, text, markdown = report_html(config, found, made), comparison_text(found), comparison_markdown(found)
    for written in (page, text, markdown):
        places = [written.index(part) for part in ("Cost of one training", "Look 1 of 3: 8 of", "SHA-256 abababababab")]
        assert places == sorted(places)
    assert "  - family holm → screening" in markdown
    (early,) = [answer.text for answer in answers({**answered(found, hypothesis(None)), "look": look})]
    assert "give `seeds`" not in early  # the next look adds them


def test_many_answers_and_warnings_are_folded() -> None:
    config = configuration()
    made = inputs(config)
    found = compared(config, made)
    declared = [hypothesis(against=name) for name in ("grpo", "grpo_lr_matched") for _ in range(3)]
    page = report_html(config, {**answered(found, *declared), "warnings": ["a", "b", "c"]}, made)
    assert page.index("4 more declared comparisons") < page.index('data-chart="answers"')
    assert page.count('<p class="answer better">') == 6
    assert re.search(r"<details>\s*<summary>Before you believe it: 3 warnings", page)
    page = report_html(config, {**answered(found, *declared[:2]), "warnings": ["a"]}, made)
    assert re.search(r"<details open>\s*<summary>Before you believe it: 1 warning<", page)
    assert "more declared comparisons" not in page


def test_the_picture_has_the_declared_differences_and_is_equal_byte_for_byte(
    found: dict[str, Any], tmp_path: Path
) -> None:
    two = answered(found, hypothesis("better"), hypothesis("undecided", against="grpo_lr_matched", kind="control"))
    for name in ("a", "b"):
        write_answer_figure(two, tmp_path / name)
    for ending in ("svg", "png"):
        assert (tmp_path / f"a/answers.{ending}").read_bytes() == (tmp_path / f"b/answers.{ending}").read_bytes()
    figure = answer_figure(two)
    assert figure is not None
    axes = figure.axes[0]
    drawn = [line.get_xdata() for line in axes.lines]
    assert [list(x) for x in drawn if len(x) == 2 and x[0] != x[1]] == [
        [0.08 - 0.05, 0.08 + 0.04],
        [0.03 - 0.05, 0.03 + 0.04],
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "grpo_actfocus − grpo: better", "grpo_actfocus − grpo_lr_matched: undecided",
    ]  # fmt: skip
    chart = answer_chart(two)
    assert chart is not None
    view = chart.views["all"]
    bounds = [bound for trace in view["data"] if trace["mode"] == "lines" for bound in trace["x"]]
    assert bounds == pytest.approx([0.03, 0.12, -0.02, 0.07])
    bands = [shape for shape in view["layout"]["shapes"] if shape["type"] == "rect"]
    assert [(band["x0"], band["x1"]) for band in bands] == [(-0.05, 0.05)]


def test_the_page_ends_with_what_was_said_before_and_when() -> None:
    config = configuration()
    found = compared(config, made := inputs(config))
    line = "Registered in hypotheses.yaml, SHA-256 0123, committed 2026-03-04. <Nothing> has changed since."
    page = report_html(config, found, made, registration=[line])
    assert page.index('<h2 id="checklist">') < page.index(line.replace("<", "&lt;").replace(">", "&gt;"))
    assert "Said before" not in report_html(config, found, made)
