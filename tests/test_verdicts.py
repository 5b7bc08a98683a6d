"""A verdict on two methods is the same in every table, text, page and figure, and is missing in all of them below six seeds."""

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
WORDS = re.compile(r"higher|lower|told apart|no clear|differs?\b|significan")
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
    config = configuration(seeds=list(range(6)))
    headline = differences_of(config, 0.5)
    assert {text.rpartition(": ")[2] for text in headline.values()} == {"higher", "not told apart"}
    texts = texts_of(config)
    for place, text in texts.items():
        plain = re.sub(r" vs \w+", "", text)
        for name, shown in headline.items():
            if place != "confirmation" or name in ("grpo_actfocus uniform", "grpo_actfocus control"):
                assert shown in plain, (place, name)


def test_below_six_seeds_no_place_has_a_verdict_or_an_interval_of_a_difference() -> None:
    config = configuration(seeds=list(range(5)))
    assert len(places(compared(config, inputs(config)))["lake"]) == 2
    for shown in differences_of(config, 0.5).values():
        assert re.fullmatch(r"[+-]0\.\d{3} \(5 seeds, [+-]0\.\d{3} to [+-]0\.\d{3}\)", shown)
    for place, text in texts_of(config).items():
        assert not WORDS.search(text), place
        assert not re.search(r"\[[+-]", text), place
        if place in ("markdown", "text", "confirmation"):
            assert "no verdict below 6 paired seeds" in text
            assert re.search("give `(sweep.confirm_)?seeds` 6 or more", text)


def test_two_revisions_are_judged_as_two_methods_are() -> None:
    config = configuration(seeds=list(range(6)))
    made = inputs(config)
    found = compared(config, made)

    def revision(name: str, method: str) -> Revision:
        """The method's episodes, under one name in both."""
        rows = [{**row, "method": "one"} for row in found["rows"] if row["method"] == method]
        return Revision(name, {}, {**found, "rows": rows}, {("lake", "one"): made.episodes["lake", method]})

    text = revisions_text(revision("a", "grpo"), revision("b", "grpo_actfocus"))
    assert differences_of(config, 0.5)["grpo_actfocus uniform"] in text


def test_the_words_of_a_verdict_are_written_in_one_place() -> None:
    """A second rule would need words of its own."""
    spoken = re.compile(r"""["'](?:is )?(?:higher|lower|not told apart|no clear difference)(?: than| from)?["']""")
    found = {
        str(file.relative_to(ROOT))
        for folder in ("pipeline", "stages")
        for file in (ROOT / folder).rglob("*.py")
        if spoken.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"pipeline/analysis/statistics.py"}


@pytest.mark.parametrize("seeds", [5, 6])
def test_a_chart_shows_every_seed_and_an_interval_only_with_a_confirmation_text(seeds: int) -> None:
    config = configuration(seeds=list(range(seeds)))
    differences = next(iter(difference_charts(config, compared(config, inputs(config)), "lake")))
    traces: list[dict[str, Any]] = differences.views["0.5 (headline)"]["data"]
    assert any(trace["mode"] == "lines" for trace in traces) == (seeds >= 6)
    single = [trace for trace in traces if trace["mode"] == "markers" and "text" not in trace]
    assert len(single) == 5
    assert {len(trace["x"]) for trace in single} == {seeds}
