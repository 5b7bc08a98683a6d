"""The comparison as tables, figures and a page."""

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

import numpy as np
import pytest

from pipeline.analysis.comparison import REFERENCE
from pipeline.analysis.interventions import intervention
from pipeline.report.charts import difference_charts, plain
from pipeline.report.comparison_figures import learning_figure, learning_panels, write_comparison_figures
from pipeline.report.comparison_tables import (
    comparison_markdown,
    comparison_text,
    interventions_markdown,
    result_table,
    verdicts_markdown,
)
from pipeline.report.curve_charts import training_charts
from pipeline.report.html import embedded, report_html
from tests.comparison_cases import ITERATIONS, RATES, ROOT, compared, configuration, curve, inputs, row_of


def test_tables_print_sizes_intervals_and_common_terms_once() -> None:
    config = configuration()
    found = compared(config, inputs(config))
    markdown, text = comparison_markdown(found), comparison_text(found)
    regulariser = config.method_defaults.regulariser
    assert f"share the same entropy and KL terms: entropy bonus {regulariser.entropy:g}" in markdown
    assert markdown.count("entropy bonus") == 1
    assert [line for line in markdown.splitlines() if line.startswith("## lake, temperature")] == [
        "## lake, temperature 0.5", "## lake, temperature 0.5 (headline)", "## lake, temperature 1",
    ]  # fmt: skip
    row = row_of(found, "grpo_actfocus")
    shown = f"{row['success_mean']:.3f} [{row['success_ci_low']:.3f}, {row['success_ci_high']:.3f}]"
    assert shown in markdown
    assert shown in text
    bounds = f"[{row['difference_to_uniform_ci_low']:+.3f}, {row['difference_to_uniform_ci_high']:+.3f}]"
    assert f"{row['difference_to_uniform']:+.3f} {bounds} p_adj " in text
    assert "[95 % interval over new seeds and initial states]" in text
    assert "4 × 8 × 3" in text
    lines = [line for line in markdown.split("\n") if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5, 17, 10}
    table = result_table(found, "lake", 1.0)
    assert all(len(cells) == len(table.header) for cells in table.rows)
    assert [cells[0] for cells in table.rows] == [*config.methods, REFERENCE]


def test_the_table_of_verdicts_has_a_row_per_declared_comparison() -> None:
    found = compared(config := configuration(), inputs(config))
    told = {**found, "comparison": "told", "interventions": {"lake": {"reasoning": "plan"}}}
    _, _, *rows = verdicts_markdown([found, told]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(cells) == 2 * len(found["hypotheses"]) > 0
    one = found["hypotheses"][0]
    assert cells[0][:4] == ["`toy`", "lake", "–", f"`{one['method']}` − `{one['against']}`"]
    assert cells[-1][:3] == ["`told`", "lake", "plan"]
    assert cells[0][4].startswith(f"{one['value']:+.3f} [{one['ci_low']:+.3f}, {one['ci_high']:+.3f}] p_adj ")


def test_the_table_of_interventions_has_a_row_per_temperature() -> None:
    states = np.array([[1.0, 0.5, 1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]])
    ways = dict(zip(("own", "none", "other"), states, strict=True))
    found = intervention("lake", "plan", {1.0: ways, 0.5: ways})
    _, _, first, second = interventions_markdown({"toy": {"lake": found}}).splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:7] == ["`toy`", "lake", "plan", "1", "0.833", "0.167", "0.167"]
    low, high = (found["temperatures"][0]["none_minus_own"][key] for key in ("ci_low", "ci_high"))
    assert cells[7] == f"-0.667 [{low:+.3f}, {high:+.3f}]"
    assert "| 0.5 |" in second


def test_status_and_source_are_shown_where_a_method_has_a_source() -> None:
    methods = {"grpo": {"source": "arXiv 2402.03300", "status": "faithful"}, "mine": {}}
    config = configuration(methods=methods, compare={"uniform": {}, "control": {}})
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
    assert row_of(found, "method_a")["success_ci_low"] is None
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
    assert texts[0].startswith(f"grpo_actfocus − grpo_lr_matched: {row['difference_to_control']:+.3f} [")
    assert texts[1].startswith(f"grpo_actfocus − grpo: {row['difference_to_uniform']:+.3f} [")
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
        "import sys, json, pipeline.report.html, pipeline.analysis.verdicts;"
        "print(json.dumps([m for m in ('torch', 'lightning', 'mlflow', 'matplotlib.pyplot') if m in sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == []
