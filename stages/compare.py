"""Compare all methods: reports/comparison.{json,md,txt}, reports/figures, reports/index.html, and a run in MLflow.

Equal runs have equal reports: what has wall-clock in it is in data/timings/report.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.cli import ParamsFile, configured, make_alone, run

if TYPE_CHECKING:
    from pipeline.report.tables import Table
    from pipeline.workspace.layout import Layout


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, _ = configured(params)
    make_alone(layout, "compare")
    from pipeline.analysis.comparison import compare, read_inputs
    from pipeline.analysis.examples import read_all_played
    from pipeline.analysis.interventions import read_interventions
    from pipeline.analysis.metrics import write_metrics
    from pipeline.analysis.timings import training_minutes
    from pipeline.progress.display import doing
    from pipeline.report.answer_figures import write_answer_figure
    from pipeline.report.checklist import checklist_tables, policy_size
    from pipeline.report.comparison_figures import write_comparison_figures, write_timed_figures
    from pipeline.report.comparison_tables import comparison_text
    from pipeline.report.declared import registration_foot, registration_warning
    from pipeline.report.html import report_html
    from pipeline.report.sweep import read_sweeps
    from pipeline.report.viewer import SavedTokenizer, viewer_data
    from pipeline.report.warnings import comparison_warnings
    from pipeline.tracking.comparison import log_comparison
    from pipeline.trajectories.table import read
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import read_record, write_json, write_text

    reports = layout.reports
    inputs = read_inputs(config, layout)
    bottleneck = {name: read_record(layout.bottleneck(name) / "bottleneck.json") for name in config.environments}
    doing("statistics")
    try:
        comparison = compare(config, inputs)
    except ValueError as error:
        raise UserError(f"{layout.out / 'data' / 'evaluations'}: {error}; `dvc repro` brings it up to date") from None
    # It is not there where no stage before this one has run.
    comparison["registration"] = read_record(layout.registration) if layout.registration.exists() else None
    if intervened := read_interventions(config, layout):
        comparison["interventions"] = intervened
    unlike = registration_warning(comparison["registration"])
    comparison["warnings"] = comparison_warnings(config, inputs.curves, comparison) + ([unlike] if unlike else [])
    doing("drawing figures")
    write_answer_figure(comparison, reports / "figures")
    write_comparison_figures(comparison, timeless := replace(inputs, timings={}), reports / "figures")
    write_timed_figures(comparison, inputs, layout.timed)
    first = bottleneck[next(iter(bottleneck))]
    write_json(reports / "bottleneck.json", {**first, "schema": 1, "environments": bottleneck})
    write_metrics(comparison, inputs.curves, reports)
    checklist = checklist_tables(config, comparison, inputs, policy_size(layout.policy), timed=False)
    _write_comparison(layout, comparison, checklist)
    doing("writing the report")
    annotated = {name: read(layout.annotated(name)) for name in config.environments}
    played = read_all_played(config, layout, annotated)
    episodes = viewer_data(config, SavedTokenizer.load(layout.policy), played)
    shown = bottleneck, annotated, episodes, read_sweeps(layout), policy_size(layout.policy)
    write_text(reports / "index.html", report_html(config, comparison, timeless, *shown))
    timed = report_html(config, comparison, inputs, *shown, registration_foot(comparison, layout))
    write_text(layout.timed / "index.html", timed)
    doing("logging to MLflow")
    log_comparison(config, Path("."), comparison, inputs.curves, episodes, layout)
    text = comparison_text(comparison, training_minutes(inputs.timings))
    return f"{text}\n{reports / 'index.html'}: the report; {layout.timed} has it with wall-clock. Next: open it, or `make ui` for the runs"


def _write_comparison(layout: Layout, comparison: dict[str, Any], checklist: list[Table]) -> None:
    """Write comparison.{json,md,txt}, with their checksums in a list beside the numbers for plots."""
    from pipeline.report.comparison_tables import comparison_markdown, comparison_text
    from pipeline.workspace.files import write_json, write_text
    from pipeline.workspace.manifest import write_manifest

    markdown, text = (layout.reports / f"comparison.{kind}" for kind in ("md", "txt"))
    write_json(layout.comparison, comparison)
    write_text(markdown, comparison_markdown(comparison, checklist))
    write_text(text, comparison_text(comparison))
    write_manifest(layout.plots, [layout.comparison, markdown, text])


if __name__ == "__main__":
    run(main)
