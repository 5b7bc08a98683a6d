"""Interactive charts of the report: plotly figures as JSON, each with a caption that says what was run.

Their texts are untrusted: plotly reads some HTML in every text, links and styles among it. ``plain`` takes that away.
"""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import plotly.graph_objects as go

from pipeline.analysis.comparison import REFERENCE, Row, difference_of, places, rows_at
from pipeline.analysis.intervals import Interval
from pipeline.report.answers import percent
from pipeline.report.comparison_tables import success_text
from pipeline.report.differences import difference_text
from pipeline.report.style import BLUE, GREY, VERMILLION, looks
from pipeline.settings.params import Config

ROW, DENSE, MANY = 46, 34, 12
"""Pixels of a row, and of one where there are more than so many."""

_HARMLESS = re.compile(r"&lt;(/?(?:br|b|i|sub|sup|extra))(?: ?/)?&gt;")


@dataclass(frozen=True)
class Chart:
    """One figure of the report, in one or several views among which the reader chooses."""

    name: str
    """Of the element in the page."""
    title: str
    caption: str
    """What it shows, how intervals are made, and what was run."""
    views: Mapping[str, Mapping[str, Any]]
    """Name -> plotly figure with ``data`` and ``layout``, no colours of text and background."""
    choice: str = ""
    """What the views differ in, for the label of the choice."""
    methods: Sequence[str] = ()
    """Methods of which the reader brings one out, by ``legendgroup``, the first one at first; empty where all stand out."""


def view(figure: go.Figure, height: int, left: int = 60, top: int = 10) -> dict[str, Any]:
    """A figure's JSON, without plotly's template; the page gives text and background their colours.

    Sizes are in pixels. Those for the labels of the vertical axis are given as ``left``, for on a narrow screen plotly
    finds no end in working them out.
    """
    figure.update_layout(
        height=height,
        margin={"l": left, "r": 10, "t": top, "b": 10},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(automargin="height")
    return plain(figure.to_dict())


def plain(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A plotly figure whose texts are texts: of the markup that plotly reads, ``br``, ``b``, ``i``, ``sub``, ``sup`` and
    ``extra`` without attributes stay. Its template and images are left out."""
    layout = {key: value for key, value in figure.get("layout", {}).items() if key not in ("template", "images")}
    return {"data": _plain(list(figure.get("data", ()))), "layout": _plain(layout)}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _HARMLESS.sub(r"<\1>", html.escape(value, quote=False))
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def trained_on(config: Config, environment: str) -> str:
    """What the trainings of a comparison were, for a caption."""
    plan, sizes = config.train, config.rollout
    return (
        f"{_run(config, environment)}, {_length(config)} of {sizes.groups} initial states × "
        f"{sizes.group_size} episodes, sampled at temperature {sizes.temperature:g}; validated every "
        f"{plan.validate_every} iterations on {config.evaluation.validation_states} states × "
        f"{config.evaluation.validation_rollouts} episodes at temperature {config.evaluation.temperatures[0]:g}."
    )


def evaluated_on(config: Config, environment: str) -> str:
    """What the evaluations of a comparison were, for a caption."""
    plan = config.evaluation
    return (
        f"{_run(config, environment)} per method, each after {_length(config)}; "
        f"{plan.states} held-out initial states × {plan.rollouts} episodes per seed and temperature."
    )


def _run(config: Config, environment: str) -> str:
    seeds = f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}"
    return f"Run: {environment} ({config.environments[environment].id}), {seeds}"


def _length(config: Config) -> str:
    """What ends the trainings."""
    plan = config.train
    if plan.tokens is None:
        return f"{plan.iterations} iterations"
    return f"as many iterations as come nearest to {plan.tokens} sampled tokens (at most {plan.iterations})"


def success_chart(config: Config, comparison: Mapping[str, Any], environment: str) -> Chart:
    """Final success of every method with its intervals and seeds, a view per temperature."""
    return Chart(
        f"{environment}-success",
        "Success after training",
        f"Success on held-out initial states after the last iteration. Marker: mean over seeds; line: "
        f"{percent(comparison['level'])} interval over new seeds and initial states; small dots: single seeds. Grey band and "
        "dashed line: the reference policy, with its interval. Which methods can be told apart is said by the paired "
        "differences. " + evaluated_on(config, environment),
        _by_temperature(comparison, environment, _success),
        "Temperature",
    )


def difference_charts(config: Config, comparison: Mapping[str, Any], environment: str) -> Iterator[Chart]:
    """Paired differences, and the probability of improvement where some method has a uniform counterpart."""
    run = evaluated_on(config, environment)
    yield Chart(
        f"{environment}-differences",
        "Paired differences in success",
        "Success of a method minus that of its matched control, its uniform counterpart and the reference policy, "
        f"paired over common seeds and initial states. Small dots: single seeds. Line: {percent(comparison['level'])} "
        "interval over new seeds and states, not corrected for the number of differences; the p value and the verdict of a "
        "declared difference are. Differences to the reference policy are not declared and have no verdict. " + run,
        _by_temperature(comparison, environment, _differences),
        "Temperature",
    )
    headline = rows_at(comparison, environment, places(comparison)[environment][0])
    if any(row["probability_of_improvement"] is not None for row in headline):
        yield Chart(
            f"{environment}-improvement",
            "Probability of improvement",
            "Share of all pairs of seeds in which the training with the method scores above the one of its uniform "
            "counterpart (ties count half). It describes these trainings; whether the two can be told apart is said by "
            "the paired differences. " + run,
            _by_temperature(comparison, environment, _improvements),
            "Temperature",
        )


def _by_temperature(
    comparison: Mapping[str, Any], environment: str, draw: Callable[[Sequence[Row]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """A view per temperature, of its rows."""
    temperatures = places(comparison)[environment]
    return {
        f"{t:g}" + " (headline)" * (t == temperatures[0]): draw(rows_at(comparison, environment, t))
        for t in temperatures
    }


class ChartRow(NamedTuple):
    """A row of a chart."""

    label: str
    value: float
    said: str
    """What is written of it where the reader points."""
    colour: str
    intervals: Mapping[float, Interval | None]
    """By the width of their lines; None is not drawn."""
    seeds: Sequence[float] = ()
    """Of single seeds."""
    symbol: str = "circle"


def _success(rows: Sequence[Row]) -> dict[str, Any]:
    reference, trained = rows[0], [row for row in rows if row["method"] != REFERENCE]
    figure = go.Figure()
    if reference["reference_ci_low"] is not None:
        band = {"x0": reference["reference_ci_low"], "x1": reference["reference_ci_high"]}
        figure.add_vrect(**band, fillcolor=GREY, opacity=0.25, line_width=0)
    figure.add_vline(x=reference["reference_success"], line={"color": GREY, "dash": "dash", "width": 1.5})
    found = []
    for row, (colour, _, symbol) in zip(trained, looks(plotly=True), strict=False):
        label, said = f"{row['method']} (n = {row['seeds']})", f"{row['method']}: {success_text(row)}"
        low, high = row["success_ci_low"], row["success_ci_high"]
        intervals: dict[float, Interval | None] = {7.0: None if low is None else Interval(low, high)}
        found.append(ChartRow(label, row["success_mean"], said, colour, intervals, row["seed_success"], symbol))
    figure.update_xaxes(title_text="success", range=[-0.01, 1.01])
    return with_rows(figure, found)


def _differences(rows: Sequence[Row]) -> dict[str, Any]:
    """Every difference; those between methods first."""
    drawn = []
    for kind, colour in (("control", VERMILLION), ("uniform", BLUE), (REFERENCE, GREY)):
        for row in rows:
            found = difference_of(row, kind)
            if found is not None:
                label = f"{row['method']} − {row.get(kind, kind)}"
                said = f"{label}: {difference_text(found)}"
                drawn.append(ChartRow(label, found.value, said, colour, {6.0: found.interval}, found.by_seed))
    ends = [0.0, *chain(*((row.value, *row.seeds, *(row.intervals[6.0] or ())) for row in drawn))]
    margin = 0.05 * (max(ends) - min(ends)) or 0.05
    figure = against_line(0.0, "difference in success", min(ends) - margin, max(ends) + margin)
    return with_rows(figure, drawn)


def _improvements(rows: Sequence[Row]) -> dict[str, Any]:
    drawn = []
    for row in rows:
        value, label = row["probability_of_improvement"], f"{row['method']} over {row['uniform']}"
        if value is not None:
            drawn.append(ChartRow(label, value, f"{label}: {value:.3f}", BLUE, {}))
    return with_rows(against_line(0.5, "probability of improvement", -0.01, 1.01), drawn)


def against_line(nothing: float, title: str, low: float, high: float) -> go.Figure:
    """An empty figure with a line where there is no difference."""
    figure = go.Figure()
    figure.add_vline(x=nothing, line={"color": GREY, "dash": "dash", "width": 1.5})
    return figure.update_xaxes(title_text=title, range=[low, high])


def with_rows(figure: go.Figure, rows: Sequence[ChartRow]) -> dict[str, Any]:
    """A row per value with its intervals, and single seeds below it."""
    for place, row in enumerate(rows):
        for width, interval in row.intervals.items():
            if interval is not None:
                figure.add_scatter(
                    x=interval, y=[place] * 2, mode="lines", hoverinfo="skip", showlegend=False,
                    line={"color": row.colour, "width": width}, opacity=0.55 if width > 2 else 1,
                )  # fmt: skip
        if row.seeds:
            figure.add_scatter(
                x=list(row.seeds), y=[place + 0.26] * len(row.seeds), mode="markers", showlegend=False,
                marker={"color": GREY, "size": 5}, hovertemplate="single seed: %{x:.3f}<extra></extra>",
            )  # fmt: skip
        figure.add_scatter(
            x=[row.value], y=[place], mode="markers", showlegend=False, text=[row.said],
            marker={"color": row.colour, "size": 11, "symbol": row.symbol, "line": {"color": "white", "width": 1}},
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    return rowed(figure, [row.label for row in rows])


def rowed(figure: go.Figure, labels: Sequence[str]) -> dict[str, Any]:
    """Rows 0, 1, ... from the top, each with its label above it: beside it there is no room on a narrow screen."""
    for place, label in enumerate(labels):
        figure.add_annotation(
            x=0, xref="paper", xanchor="left", y=place - 0.36, yref="y", text=label, showarrow=False, font={"size": 12}
        )
    figure.update_yaxes(range=[len(labels) - 0.5, -0.7], showticklabels=False, showgrid=False, zeroline=False)
    return view(figure, 70 + (ROW if len(labels) <= MANY else DENSE) * max(2, len(labels)), left=10)
