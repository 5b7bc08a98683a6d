"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report.comparison import Curves
from pipeline.report.comparison_figures import FigureFile
from pipeline.report.comparison_tables import READING, common_terms, places, result_table, training_table
from pipeline.report.timings import time_table

Figures = Mapping[str, Sequence[FigureFile]]
"""Environment -> its figures."""


def report_html(
    comparison: Mapping[str, Any],
    figures: Figures,
    bottleneck: Mapping[str, Mapping[str, Any]] | None = None,
    bottleneck_figures: Figures | None = None,
    timings: Mapping[tuple[str, str], Curves] | None = None,
) -> str:
    """Tables, warnings and figures of a comparison as a self-contained page; every text in it is escaped.

    Args:
        comparison: what ``compare`` gave.
        figures: what ``write_comparison_figures`` gave; the SVG files are read.
        bottleneck: environment -> its Action Bottleneck diagnostics (``energy.diagnostics.bottleneck``).
        bottleneck_figures: environment -> figures of those.
        timings: (environment, method) -> wall-clock of its trainings.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = _data_uri
    sections = [
        {
            "name": name,
            "tables": [result_table(comparison, name, temperature) for temperature in temperatures],
            "training": training_table(comparison, name),
            "time": time_table(name, timings or {}),
            "figures": figures.get(name, ()),
            "bottleneck": (bottleneck or {}).get(name),
            "bottleneck_figures": (bottleneck_figures or {}).get(name, ()),
        }
        for name, temperatures in places(comparison).items()
    ]
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison, reading=READING, terms=common_terms(comparison), sections=sections
    )


def _data_uri(svg: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"
