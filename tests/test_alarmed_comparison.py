"""A comparison over trainings that have alarmed says so wherever it speaks; over others nothing is different."""

from __future__ import annotations

import json
from typing import Any

from pipeline.analysis.alarmed import alarmed, alarms_of
from pipeline.analysis.comparison import Inputs
from pipeline.analysis.metrics import headline_metrics
from pipeline.report.answer_figures import answer_chart, label_of
from pipeline.report.answers import alarm_lines, answers
from pipeline.report.comparison_tables import comparison_markdown, comparison_text, verdicts_markdown
from pipeline.report.html import report_html
from pipeline.settings.params import Config
from tests.comparison_cases import compared, configuration, inputs, row_of

SEEDS = list(range(8))


def planted(**changes: Any) -> tuple[Config, Inputs]:
    """Eight seeds, so that there are verdicts; of ``grpo`` two have alarmed."""
    config = configuration(seeds=SEEDS, **changes)
    made = inputs(config)
    curves = made.curves["lake", "grpo"]
    curves["3"][5]["alarm_success"] = 0.02
    curves["3"][6]["alarm_success"] = 0.01
    curves["6"][2]["alarm_kl"] = 7.5512345
    curves["6"][6]["alarm_success"] = 0.04
    return config, made


def test_the_curves_are_read_by_alarm_and_by_method() -> None:
    _, made = planted()
    curves = made.curves["lake", "grpo"]
    assert alarms_of(curves) == {
        "kl": {"seeds": ["6"], "iteration": 2, "value": 7.55123},
        "success": {"seeds": ["3", "6"], "iteration": 5, "value": 0.02},
    }
    by_method = {method: own for (_, method), own in made.curves.items()}
    assert alarmed(by_method) == {"grpo": ["3", "6"]}


def test_every_verdict_over_an_alarmed_training_says_so() -> None:
    config, made = planted()
    found = compared(config, made)
    row = row_of(found, "grpo")
    assert (row["alarmed_seeds"], list(row["alarms"])) == (2, ["kl", "success"])
    assert headline_metrics(found)["lake"]["grpo"]["alarmed_seeds"] == 2
    own = {one["against"]: one.get("alarmed") for one in found["hypotheses"]}
    assert own == {"grpo": {"grpo": ["3", "6"]}, "grpo_lr_matched": None}
    assert {one["verdict"] for one in found["hypotheses"]} == {"better"}
    said = {one.claim for one in answers(found)}
    assert said == {
        "On lake, grpo_actfocus is better than grpo (its uniform counterpart), but trainings have alarmed (2 of grpo)",
        "On lake, grpo_actfocus is better than grpo_lr_matched (its control)",
    }
    (line,) = alarm_lines(found)
    assert line == (
        "Alarms in 2 of 8 trainings of grpo on lake: KL rose to 7.55 nats per token (from iteration 2 on; seed 6); "
        "success fell to 0.02 (from iteration 5 on; seeds 3, 6)."
    )
    text, tables = comparison_text(found), comparison_markdown(found)
    assert line in " ".join(text.split())
    assert line in tables
    assert tables.count(": better (alarms in grpo)") == 2
    assert "| kl, success |" in tables
    assert verdicts_markdown([found]).count("(alarms in grpo)") == 1
    assert [label_of(found, one).endswith(": better, alarms") for one in found["hypotheses"]] == [True, False]
    page = report_html(config, found, made)
    assert page.index('<p class="alarm">Alarms in 2 of 8 trainings of grpo') < page.index("<table>")


def test_without_an_alarm_nothing_of_it_is_written() -> None:
    config = configuration(seeds=SEEDS)
    made = inputs(config)
    found = compared(config, made)
    chart = answer_chart(found)
    assert chart is not None
    for text in (json.dumps(found), comparison_text(found), comparison_markdown(found), json.dumps(chart.views)):
        assert "alarm" not in text.lower()
    page = report_html(config, found, made)
    assert 'class="alarm"' not in page
    assert 'aria-label="Alarms"' not in page


def test_a_training_that_is_left_out_does_not_count_against_a_verdict() -> None:
    compare = {
        "uniform": {"grpo_actfocus": "grpo"},
        "exclusions": [
            {"environment": "lake", "method": "grpo", "seed": seed, "reason": "the disk was full"} for seed in (3, 6)
        ],
    }
    config, made = planted(compare=compare)
    found = compared(config, made)
    assert not any("alarmed" in one for one in found["hypotheses"])
    assert "difference_to_uniform_alarmed" not in row_of(found, "grpo_actfocus")
    assert row_of(found, "grpo")["alarmed_seeds"] == 2, "it is still shown"
