"""Charts of the trainings: learning curves, health, and which roles the gradient comes from."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pipeline.analysis.comparison import Inputs
from pipeline.analysis.curves import (
    SMOOTHING,
    Curves,
    costs,
    over_seeds,
    series_of,
    smoothed,
    spent,
    uneven,
    validations,
)
from pipeline.analysis.scores import significant
from pipeline.report.charts import Chart, rowed, trained_on, view
from pipeline.report.style import COSTS, CROWD, HEALTH, ROLE_COLOURS, ROLE_PATTERNS, looks
from pipeline.settings.params import Config

SHARES = {"of the gradient, measured": "measured_gradient_share_", "of |c A|, counted": "gradient_share_"}
"""What is shared -> the beginning of its keys in the learning curves."""

CUT = (
    "Some seeds had more iterations than others of their method: what comes after the shortest one's last is left out, but "
    "for a last marker, which is every seed's validation at its own end."
)


def training_charts(config: Config, inputs: Inputs, environment: str, tokens: Mapping[str, int]) -> Iterator[Chart]:
    """All charts of an environment's trainings.

    ``tokens`` is how many tokens of the reference policy's responses have each role; empty if unknown.
    """
    curves = {method: found for (place, method), found in inputs.curves.items() if place == environment}
    timings = {method: found for (place, method), found in inputs.timings.items() if place == environment}
    crowd = sorted(curves, key=lambda method: method not in config.compare.uniform) if len(curves) > CROWD else ()
    shown, run = costs(config.train.tokens, bool(timings)), trained_on(config, environment)
    if any(uneven(curve) for curve in curves.values()):
        run = f"{CUT} {run}"
    bands = "Line: mean over seeds; band: lowest to highest seed, which is no confidence interval."
    yield Chart(
        f"{environment}-learning",
        "Learning curves",
        f"Success of the training episodes, a centred moving mean over {SMOOTHING} iterations, before means and ranges "
        f"are taken. {bands} Markers: success on the validation states, mean over seeds, not smoothed. Every value "
        "stands at what had been spent when the policy that it belongs to was made; episodes, tokens and seconds are "
        f"means over seeds. {run}",
        {cost: _learning(curves, timings, cost) for cost in shown},
        "Over",
        crowd,
    )
    yield Chart(
        f"{environment}-health",
        "Training health",
        f"Per iteration, not smoothed. {bands} Entropy and KL are those of the sampled episodes, before the iteration's "
        f"update; the rest are means over its updates. Gaps are iterations in which no group could be trained on. {run}",
        {title: _health(curves, key, title, shown[0]) for key, title in HEALTH.items()},
        "What",
        crowd,
    )
    yield Chart(
        f"{environment}-gradient",
        "Gradient share by role",
        "Whose tokens the policy's gradient comes from: mean over seeds and iterations, without intervals. Measured: "
        "norms of the gradients of a sample of single tokens, summed by role. Counted: |c A|, coefficient times "
        "advantage, over all trained tokens. The top row is how the reference policy's response tokens divide into "
        f"roles. {run}",
        {title: _shares(curves, prefix, tokens) for title, prefix in SHARES.items()},
        "Share",
    )


def _learning(curves: Mapping[str, Curves], timings: Mapping[str, Curves], cost: str) -> dict[str, Any]:
    figure = go.Figure()
    for (method, curve), (colour, dash, symbol) in zip(curves.items(), looks(plotly=True), strict=False):
        if cost == "seconds" and method not in timings:
            continue
        place = spent(curve, timings.get(method), cost)
        _band(figure, method, len(curve), place[:-1], smoothed(series_of(curve, "success")), colour, dash)
        x, y = validations(curve, timings.get(method), cost)
        figure.add_scatter(
            x=_numbers(x), y=_numbers(y), mode="markers", legendgroup=method, showlegend=False,
            marker={"color": colour, "symbol": symbol, "size": 8, "line": {"color": "white", "width": 1}},
            name=method, hovertemplate=f"{method}<br>validation %{{y:.3f}} at %{{x:,.0f}}<extra></extra>",
        )  # fmt: skip
    return _over(figure, curves, cost, "success")


def _health(curves: Mapping[str, Curves], key: str, title: str, cost: str) -> dict[str, Any]:
    figure = go.Figure()
    for (method, curve), (colour, dash, _) in zip(curves.items(), looks(plotly=True), strict=False):
        series = series_of(curve, key)
        _band(figure, method, len(curve), spent(curve, None, cost)[:-1], series, colour, dash)
    return _over(figure, curves, cost, title)


def _over(figure: go.Figure, curves: Mapping[str, Curves], cost: str, title: str) -> dict[str, Any]:
    figure.update_layout(showlegend=len(curves) <= CROWD)
    figure.update_xaxes(title_text=COSTS[cost])
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return view(figure, 440)


def _band(
    figure: go.Figure, method: str, seeds: int, x: np.ndarray, series: np.ndarray, colour: str, dash: str
) -> None:
    """Mean over seeds as a line, and the range between lowest and highest; where no seed has a value, a gap in the line."""
    mean, low, high = over_seeds(series)
    known = np.isfinite(mean)
    figure.add_scatter(
        x=_numbers(np.concatenate([x[known], x[known][::-1]])),
        y=_numbers(np.concatenate([high[known], low[known][::-1]])),
        mode="lines", fill="toself", fillcolor=_faint(colour), line={"width": 0, "color": colour}, hoverinfo="skip",
        legendgroup=method, showlegend=False, name=method,
    )  # fmt: skip
    figure.add_scatter(
        x=_numbers(x), y=_numbers(mean), mode="lines", line={"color": colour, "dash": dash, "width": 2},
        legendgroup=method, name=f"{method} (n = {seeds})",
        hovertemplate=f"{method}<br>%{{y:.3f}} at %{{x:,.0f}}<extra></extra>",
    )  # fmt: skip


def _shares(curves: Mapping[str, Curves], prefix: str, tokens: Mapping[str, int]) -> dict[str, Any]:
    rows = (
        {"all response tokens": {role: tokens[role] / sum(tokens.values()) for role in ROLE_PATTERNS}} if tokens else {}
    )
    for method, curve in curves.items():
        found = {role: _mean(series_of(curve, prefix + role)) for role in ROLE_PATTERNS}
        if sum(found.values()) > 0:
            rows[method] = found
    figure = go.Figure()
    for role, pattern in ROLE_PATTERNS.items():
        figure.add_bar(
            x=[round(row[role], 4) for row in rows.values()], y=list(range(len(rows))), orientation="h", name=role,
            marker={"color": ROLE_COLOURS[role], "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "#ffffff"}},
            width=0.36, customdata=list(rows), hovertemplate=f"%{{customdata}}: %{{x:.1%}} {role}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    return rowed(figure, list(rows))


def _faint(colour: str) -> str:
    return f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.15)"


def _mean(series: np.ndarray) -> float:
    return float(series[np.isfinite(series)].mean()) if np.isfinite(series).any() else 0.0


def _numbers(values: np.ndarray) -> list[float | None]:
    """As JSON has them: six digits, null for NaN."""
    return [significant(value) for value in values]
