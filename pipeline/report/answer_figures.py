"""The one picture of the first screen: every declared difference with its interval, zero, and what counts as none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipeline.analysis.intervals import Interval
from pipeline.report.answers import in_order, percent
from pipeline.report.charts import Chart, ChartRow, against_line, with_rows
from pipeline.report.style import BLUE, FAINT, GREEN, GREY, QUIET, STYLE, VERMILLION, WIDTH, save

VERDICT_LOOKS = {
    "better": (BLUE, "circle", "o"),
    "worse": (VERMILLION, "diamond", "D"),
    "equivalent": (GREEN, "square", "s"),
    "undecided": (GREY, "circle", "o"),
    None: (GREY, "x", "X"),
}
"""Verdict -> colour, and its marker by plotly's name and by matplotlib's."""


def answer_chart(comparison: Mapping[str, Any]) -> Chart | None:
    """The declared differences, a row each, the primary method's first; None where nothing was declared."""
    declared = in_order(comparison)
    if not declared:
        return None
    smallest = comparison["smallest_effect"]
    low, high = _range(declared, smallest)
    figure = against_line(0.0, "difference in success", low, high)
    figure.add_vrect(x0=-smallest, x1=smallest, fillcolor=GREY, opacity=0.18, line_width=0, layer="below")
    rows = []
    for found in declared:
        colour, symbol, _ = VERDICT_LOOKS[found["verdict"]]
        label = label_of(comparison, found)
        said = f"{label}, {found['value']:+.3f}"
        interval = None if found["ci_low"] is None else Interval(found["ci_low"], found["ci_high"])
        rows.append(ChartRow(label, found["value"], said, colour, {6.0: interval}, found["by_seed"], symbol))
    levels = " and ".join(dict.fromkeys(percent(found["level"]) for found in declared if found["ci_low"] is not None))
    line = f"Line: {levels} interval; small" if levels else "Small"
    return Chart(
        "answers",
        "The declared differences in success",
        f"Right of zero the first method is better. {line} dots: single seeds; grey band: differences within "
        f"±{smallest:g} count as none.",
        {"all": with_rows(figure, rows)},
    )


def answer_figure(comparison: Mapping[str, Any]) -> Figure | None:
    """The same for documents, in matplotlib."""
    declared = in_order(comparison)
    if not declared:
        return None
    smallest = comparison["smallest_effect"]
    with rc_context(STYLE):
        figure = Figure((WIDTH, 1.7 + 0.5 * len(declared)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(-smallest, smallest, color=FAINT, alpha=0.6, lw=0, zorder=0)
        axes.axvline(0.0, color=QUIET, lw=1, ls="--")
        for place, found in enumerate(declared):
            colour, _, marker = VERDICT_LOOKS[found["verdict"]]
            if found["ci_low"] is not None:
                axes.plot([found["ci_low"], found["ci_high"]], [place] * 2, color=colour, lw=4, alpha=0.55, zorder=2)
            seeds = found["by_seed"]
            axes.plot(seeds, [place + 0.26] * len(seeds), ".", color=QUIET, ms=4, mec="none", alpha=0.8, zorder=3)
            axes.plot(found["value"], place, marker, color=colour, ms=8, mec="white", mew=0.8, zorder=4)
        axes.set_xlim(_range(declared, smallest))
        axes.set_ylim(len(declared) - 0.5, -0.5)
        axes.set_yticks(range(len(declared)), [label_of(comparison, found) for found in declared])
        axes.set_xlabel("difference in success")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        figure.legend(handles=_signs(declared, smallest), loc="outside lower center", ncols=4)
    return figure


def write_answer_figure(comparison: Mapping[str, Any], folder: Path) -> None:
    """Write ``answers.png`` and ``answers.svg``, where something was declared."""
    figure = answer_figure(comparison)
    if figure is not None:
        save(figure, folder / "answers")


def label_of(comparison: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Of a row: both methods, the environment where there are several, and the verdict."""
    several = len({each["environment"] for each in comparison["hypotheses"]}) > 1
    where = f", {found['environment']}" if several else ""
    alarmed = ", alarms" if "alarmed" in found else ""
    return f"{found['method']} − {found['against']}{where}: {found['verdict'] or 'no verdict'}{alarmed}"


def _range(declared: Sequence[Mapping[str, Any]], smallest: float) -> tuple[float, float]:
    """Ends of the axis: all that is drawn, and a margin."""
    ends = [-smallest, smallest]
    for found in declared:
        ends += [found["value"], *found["by_seed"]]
        ends += [] if found["ci_low"] is None else [found["ci_low"], found["ci_high"]]
    margin = 0.05 * (max(ends) - min(ends)) or 0.05
    return min(ends) - margin, max(ends) + margin


def _signs(declared: Sequence[Mapping[str, Any]], smallest: float) -> list[Any]:
    """Of the legend, what is drawn alone."""
    levels = dict.fromkeys(percent(found["level"]) for found in declared if found["ci_low"] is not None)
    return [
        Line2D([], [], color=QUIET, marker="o", ls="", ms=7, label="difference"),
        *(Line2D([], [], color=QUIET, lw=4, alpha=0.55, label=f"{level} interval") for level in levels),
        Line2D([], [], color=QUIET, marker=".", ls="", ms=4, label="single seeds"),
        Patch(color=FAINT, alpha=0.6, label=f"within ±{smallest:g}: counts as none"),
    ]
