"""Figures of the comparison: final success, learning curves, training health. Same numbers, same bytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from pipeline.analysis.comparison import REFERENCE, Inputs, places, rows_at
from pipeline.analysis.curves import Curves, costs, over_seeds, series_of, smoothed, spent, validations
from pipeline.report.answers import percent
from pipeline.report.style import COSTS, CROWD, FAINT, HEALTH, METHOD_COLOURS, QUIET, STYLE, WIDTH, looks, save


def write_comparison_figures(comparison: Mapping[str, Any], inputs: Inputs, folder: Path) -> dict[str, list[Path]]:
    """Write all figures as PNG and SVG, with the same bytes for the same numbers; returns the SVG files by environment."""
    return {
        environment: [
            save(figure, folder / f"{environment}-{name}")[1]
            for name, figure in _figures(comparison, inputs, environment).items()
        ]
        for environment in places(comparison)
    }


def write_timed_figures(comparison: Mapping[str, Any], inputs: Inputs, folder: Path) -> None:
    """Write the learning curves with what they have taken in seconds, which no two runs have in common."""
    for environment in places(comparison):
        save(_learning(comparison, inputs, environment), folder / f"{environment}-learning")


def success_figure(comparison: Mapping[str, Any], environment: str) -> Figure:
    """Final success of every method with its intervals and seeds, a panel per temperature."""
    temperatures = places(comparison)[environment]
    trained = [r for r in rows_at(comparison, environment, temperatures[0]) if r["method"] != REFERENCE]
    methods = [row["method"] for row in trained]
    with rc_context(STYLE):
        figure = Figure((max(6.4, 1.6 + 3.6 * len(temperatures)), 1.5 + 0.42 * len(methods)), layout="constrained")
        panels = figure.subplots(1, len(temperatures), sharey=True, sharex=True, squeeze=False)[0]
        for axes, temperature in zip(panels, temperatures, strict=True):
            _success_panel(axes, rows_at(comparison, environment, temperature), temperature)
        panels[0].set_yticks(range(len(methods)), [f"{row['method']}  (n = {row['seeds']})" for row in trained])
        panels[0].set_ylim(len(methods) - 0.5, -0.5)
        signs: dict[str, dict[str, Any]] = {
            "mean over seeds": {"marker": "o", "ls": "", "ms": 7},
            f"{percent(comparison['level'])} interval, seeds × states": {"lw": 4, "alpha": 0.55},
            "single seeds": {"marker": ".", "ls": "", "ms": 4},
            "reference (band: its interval)": {"lw": 1, "ls": "--"},
        }
        figure.legend(
            handles=[Line2D([], [], color=QUIET, label=label, **look) for label, look in signs.items()],
            loc="outside lower center",
            ncols=1 + len(temperatures),
        )
    return figure


def learning_figure(curves: Mapping[str, Curves], timings: Mapping[str, Curves], tokens: int | None = None) -> Figure:
    """Training and validation success over what was spent: iterations, episodes, tokens and, where known, seconds.

    Methods have their colours in the order of their curves. If the trainings have a budget of tokens, these come first.
    """
    shown = costs(tokens, bool(timings))
    rows, columns = (2, 2) if len(shown) == 4 else (1, 3)
    with rc_context(STYLE):
        figure = Figure((WIDTH, 3.3 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
        for axes, cost in zip(panels, shown, strict=True):
            for (method, curve), (colour, dash, marker) in zip(curves.items(), looks(), strict=False):
                if cost == "seconds" and method not in timings:
                    continue
                place = spent(curve, timings.get(method), cost)
                _band(axes, place[:-1], smoothed(series_of(curve, "success")), colour, dash)
                points = validations(curve, timings.get(method), cost)
                axes.plot(*points, marker, color=colour, ms=5, mec="white", mew=0.7, zorder=4)
            _spending(axes, cost)
            axes.margins(x=0.02)
        figure.axes[0].set_ylim(bottom=0)
        for axes in figure.axes[::columns]:
            axes.set_ylabel("success")
        _legend(figure, curves, marked=True)
    return figure


def learning_panels(curves: Mapping[str, Curves], tokens: int | None = None) -> Figure:
    """Training and validation success, a panel per method; the others' means lie behind it in grey.

    It is over iterations or, where the trainings have a budget of them, over sampled tokens.
    """
    cost = costs(tokens, timed=False)[0]
    smooth = {method: smoothed(series_of(curve, "success")) for method, curve in curves.items()}
    places = {method: spent(curve, None, cost) for method, curve in curves.items()}
    with rc_context(STYLE):
        rows = math.ceil(len(curves) / 4)
        figure = Figure((WIDTH, 1.75 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flat
        for (method, curve), axes in zip(curves.items(), panels, strict=False):
            for other, series in smooth.items():
                axes.plot(places[other][:-1], np.nanmean(series, axis=0), color=FAINT, lw=0.6, zorder=1)
            _band(axes, places[method][:-1], smooth[method], METHOD_COLOURS[0], "-")
            points = validations(curve, None, cost)
            axes.plot(*points, "o", color=METHOD_COLOURS[1], ms=4, mec="white", mew=0.6, zorder=4)
            axes.set_title(method, fontsize=9)
        for axes in panels:  # what is left of the last row
            axes.set_visible(False)
        figure.axes[0].set_ylim(bottom=0)
        if cost == "tokens":
            figure.axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.supxlabel(COSTS[cost], fontsize=10)
        figure.supylabel("success", fontsize=10)
    return figure


def health_figure(curves: Mapping[str, Curves], tokens: int | None = None) -> Figure:
    """What shows whether the trainings were healthy, mean over seeds and range: over iterations or budgeted tokens."""
    cost = costs(tokens, timed=False)[0]
    with rc_context(STYLE):
        figure = Figure((WIDTH, 6 + 0.2 * max(0, math.ceil(len(curves) / 4) - 2)), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(2, 3, sharex=True).flat, HEALTH.items(), strict=True):
            for curve, (colour, dash, _) in zip(curves.values(), looks(), strict=False):
                series = series_of(curve, key)
                _band(axes, spent(curve, None, cost)[:-1], series, colour, dash, spread=len(curves) <= CROWD)
            axes.set_title(title, fontsize=10)
        for axes in figure.axes[-3:]:
            _spending(axes, cost)
        _legend(figure, curves, marked=False)
    return figure


def _figures(comparison: Mapping[str, Any], inputs: Inputs, environment: str) -> dict[str, Figure]:
    """Name -> figure."""
    curves = {method: curve for (place, method), curve in inputs.curves.items() if place == environment}
    return {
        "success": success_figure(comparison, environment),
        "learning": _learning(comparison, inputs, environment),
        "health": health_figure(curves, comparison["tokens"]),
    }


def _learning(comparison: Mapping[str, Any], inputs: Inputs, environment: str) -> Figure:
    curves = {method: curve for (place, method), curve in inputs.curves.items() if place == environment}
    timings = {method: timing for (place, method), timing in inputs.timings.items() if place == environment}
    tokens, crowd = comparison["tokens"], len(curves) > CROWD
    return learning_panels(curves, tokens) if crowd else learning_figure(curves, timings, tokens)


def _success_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], temperature: float) -> None:
    reference = rows[0]
    if reference["reference_ci_low"] is not None:
        axes.axvspan(reference["reference_ci_low"], reference["reference_ci_high"], color=FAINT, lw=0, zorder=0)
    axes.axvline(reference["reference_success"], color=QUIET, lw=1, ls="--")
    trained = [row for row in rows if row["method"] != REFERENCE]
    for place, (row, (colour, _, marker)) in enumerate(zip(trained, looks(), strict=False)):
        if row["success_ci_low"] is not None:
            bounds = [row["success_ci_low"], row["success_ci_high"]]
            axes.plot(bounds, [place] * 2, color=colour, lw=4, alpha=0.55, zorder=2)
        seeds = row["seed_success"]
        axes.plot(seeds, [place + 0.24] * len(seeds), ".", color=QUIET, ms=4, mec="none", alpha=0.8, zorder=3)
        axes.plot(row["success_mean"], place, marker, color=colour, ms=7, mec="white", mew=0.8, zorder=4)
    axes.set_title(f"temperature {temperature:g}")
    axes.set_xlabel("success")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _spending(axes: Axes, cost: str) -> None:
    """An axis of what was spent, in thousands where there are so many."""
    axes.set_xlabel(COSTS[cost])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _band(axes: Axes, x: np.ndarray, series: np.ndarray, colour: str, dash: str, spread: bool = True) -> None:
    """Mean over seeds and the range between the lowest and the highest; a gap where no seed has a value."""
    mean, low, high = over_seeds(series)
    if spread:
        axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
    axes.plot(x, mean, dash, color=colour, lw=1.6 if spread else 1.0)


def _legend(figure: Figure, curves: Mapping[str, Curves], marked: bool) -> None:
    """Below the figure, every method once, with the marker of its validation points if there are any."""
    handles = [
        Line2D([], [], color=colour, ls=dash, marker=marker if marked else "", label=f"{method} (n = {len(curve)})")
        for (method, curve), (colour, dash, marker) in zip(curves.items(), looks(), strict=False)
    ]
    columns = math.ceil(len(handles) / math.ceil(len(handles) / 4))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
