"""A verdict on two methods is the same in every table, text, page and figure, and is missing in all where there is none."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.comparison import difference_of, places, rows_at
from pipeline.analysis.revisions import Revision
from pipeline.report.charts import difference_charts
from pipeline.report.comparison_tables import BRACKETS, READING, comparison_markdown, comparison_text
from pipeline.report.differences import difference_text
from pipeline.report.html import report_html
from pipeline.report.revisions import revisions_text
from pipeline.settings.params import Config
from pipeline.sweep.confirm import confirmation_text
from tests.test_comparison import compared, configuration, inputs

ROOT = Path(__file__).parents[1]
WORDS = re.compile(r"\b(?:better|worse|equivalent|undecided)\b|told apart|no clear|significan")
"""With which a verdict is spoken, or might be."""


def texts_of(config: Config) -> dict[str, str]:
    """What is written of a comparison, by where: results only, without the explanations of how to read them."""
    made = inputs(config)
    found = compared(config, made)
    page = report_html(config, found, made).split("<main", 1)[1]
    cells = "\n".join(html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", page))
    charts = [
        text
        for chart in difference_charts(config, found, "lake")
        for view in chart.views.values()
        for trace in view["data"]
        for text in trace.get("text", ())
    ]
    return {
        "markdown": comparison_markdown(found).replace(READING, ""),
        "text": comparison_text(found).replace(BRACKETS, ""),
        "cells of the page": cells,
        "charts": "\n".join(charts),
        "confirmation": confirmation_text(found),
    }


def differences_of(config: Config, temperature: float) -> dict[str, str]:
    """Method and what it is compared with -> the difference as it should be written."""
    rows = rows_at(compared(config, inputs(config)), "lake", temperature)
    return {
        f"{row['method']} {kind}": difference_text(difference)
        for row in rows
        for kind in ("reference", "uniform", "control")
        if (difference := difference_of(row, kind)) is not None
    }


def test_every_place_says_the_same_of_the_same_numbers() -> None:
    config = configuration(seeds=list(range(8)))
    headline = differences_of(config, 0.5)
    said = {name: text.rpartition(": ")[2] for name, text in headline.items() if "p_adj" in text}
    assert set(said) == {"grpo_actfocus uniform", "grpo_actfocus control"}
    assert set(said.values()) <= {"better", "undecided"}
    assert "better" in said.values()
    texts = texts_of(config)
    for place, text in texts.items():
        plain = re.sub(r" vs \w+", "", text)
        for name, shown in headline.items():
            # A terminal has no room for what is not declared.
            if place not in ("text", "confirmation") or name in ("grpo_actfocus uniform", "grpo_actfocus control"):
                assert shown in plain, (place, name)


def test_below_the_fewest_seeds_no_place_has_a_verdict() -> None:
    config = configuration(seeds=list(range(6)))
    assert len(places(compared(config, inputs(config)))["lake"]) == 2
    for place, text in texts_of(config).items():
        assert not WORDS.search(text), place
        if place in ("markdown", "text", "confirmation"):
            assert "no verdict below 7 paired seeds" in text
            assert re.search("give `(sweep.confirm_)?seeds` 7 or more", text)


def test_what_is_not_declared_is_not_judged() -> None:
    config = configuration(seeds=list(range(10)))
    found = compared(config, inputs(config))
    assert found["family"] == {"kind": "holm", "size": 2, "alpha": 0.05, "least_seeds": 7}
    for row in found["rows"]:
        for kind in ("reference", "uniform", "control"):
            declared = row["headline"] and kind != "reference" and row[kind] is not None
            assert (row[f"difference_to_{kind}_verdict"] is not None) == declared
            assert (row[f"difference_to_{kind}_p_adjusted"] is not None) == declared
    rows = {row["method"]: row for row in found["rows"] if row["headline"]}
    for one in found["hypotheses"]:
        row, name = rows[one["method"]], f"difference_to_{one['kind']}"
        assert (one["value"], one["ci_low"], one["p"]) == (row[name], row[f"{name}_ci_low"], row[f"{name}_p"])
        assert (one["p_adjusted"], one["verdict"]) == (row[f"{name}_p_adjusted"], row[f"{name}_verdict"])


def test_two_revisions_are_judged_as_two_methods_are() -> None:
    config = configuration(seeds=list(range(6)))
    made = inputs(config)
    found = compared(config, made)

    def revision(name: str, method: str) -> Revision:
        """The method's episodes, under one name in both."""
        rows = [{**row, "method": "one"} for row in found["rows"] if row["method"] == method]
        return Revision(name, {}, {**found, "rows": rows}, {("lake", "one"): made.episodes["lake", method]})

    text = revisions_text(revision("a", "grpo"), revision("b", "grpo_actfocus"))
    alone = config.compare.model_copy(update={"control": {}})
    assert differences_of(config.model_copy(update={"compare": alone}), 0.5)["grpo_actfocus uniform"] in text


def test_the_words_of_a_verdict_are_written_in_one_place() -> None:
    """A second rule would need words of its own. The others begin sentences with a verdict, wait for one or count them."""
    spoken = re.compile(
        r"""(?<!\{)["'](?:is )?(?:better|worse|equivalent|undecided|not told apart)(?: than| from)?["'](?!:)"""
    )
    found = {
        str(file.relative_to(ROOT))
        for folder in ("pipeline", "stages")
        for file in (ROOT / folder).rglob("*.py")
        if spoken.search(file.read_text(encoding="utf-8"))
    }
    rule = "pipeline/analysis/verdicts.py"
    readers = ("analysis/looks.py", "analysis/looks_simulation.py", "report/answers.py", "report/simulated.py")
    assert found == {rule, *(f"pipeline/{name}" for name in readers)}


@pytest.mark.parametrize("seeds", [1, 6])
def test_a_chart_shows_every_seed_and_an_interval_where_there_is_one(seeds: int) -> None:
    config = configuration(seeds=list(range(seeds)))
    differences = next(iter(difference_charts(config, compared(config, inputs(config)), "lake")))
    traces: list[dict[str, Any]] = differences.views["0.5 (headline)"]["data"]
    assert any(trace["mode"] == "lines" for trace in traces) == (seeds > 1)
    single = [trace for trace in traces if trace["mode"] == "markers" and "text" not in trace]
    assert len(single) == 5
    assert {len(trace["x"]) for trace in single} == {seeds}
