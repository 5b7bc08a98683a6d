"""Compare all methods: reports/comparison.{json,md,txt}, reports/figures, reports/index.html, and a run in MLflow."""

from __future__ import annotations

from pathlib import Path

from stages.command import configured, out_folder, parse_arguments, run

BOTTLENECK = (
    (
        "correlations.svg",
        "Token energy and return variance",
        "One point per group of the reference policy's episodes: mean energy of its action, reasoning or all response "
        "tokens against the variance of its returns, with Spearman's rank correlation and its 95 % bootstrap interval.",
    ),
    (
        "energy_by_role.svg",
        "Token energy by role",
        "Energies of the reference policy's sampled tokens, by role.",
    ),
)
"""Figures of the annotate stage that the report shows: file, title, caption."""


def main() -> str:
    config = configured(parse_arguments(__doc__))
    from pipeline.config import ConfigError
    from pipeline.files import read_json, write_json, write_text
    from pipeline.report.comparison import compare, read_inputs
    from pipeline.report.comparison_figures import FigureFile, write_comparison_figures
    from pipeline.report.comparison_tables import comparison_markdown, comparison_text
    from pipeline.report.html import report_html
    from pipeline.tracking.comparison import log_comparison

    out = out_folder(config)
    reports = out / "reports"
    inputs = read_inputs(config, out / "data")
    bottleneck = {name: read_json(reports / "bottleneck" / name / "bottleneck.json") for name in config.environments}
    try:
        comparison = compare(config, inputs)
    except ValueError as error:
        raise ConfigError(f"{out / 'data' / 'evaluations'}: {error}; `dvc repro` brings it up to date") from None
    figures = write_comparison_figures(comparison, inputs, reports / "figures")
    first = next(iter(config.environments))
    write_json(reports / "bottleneck.json", {**bottleneck[first], "schema": 1, "environments": bottleneck})
    write_json(reports / "comparison.json", comparison)
    write_text(reports / "comparison.md", comparison_markdown(comparison))
    text = comparison_text(comparison)
    write_text(reports / "comparison.txt", text)
    drawn = {
        name: [FigureFile(title, caption, reports / "bottleneck" / name / file) for file, title, caption in BOTTLENECK]
        for name in bottleneck
    }
    write_text(reports / "index.html", report_html(comparison, figures, bottleneck, drawn, inputs.timings))
    log_comparison(config, Path("."), comparison, reports)
    return f"{text}\n{reports / 'index.html'}: the report. Next: open it, or `make ui` for the runs"


if __name__ == "__main__":
    run(main)
