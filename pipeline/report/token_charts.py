"""Charts of the reference policy's tokens: the Action Bottleneck, and energy by role."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.analysis.bottleneck import SCOPES, group_energy
from pipeline.report.bottleneck_figures import energies_by_role, rho_text
from pipeline.report.charts import Chart, view
from pipeline.report.style import GREY, ROLE_COLOURS
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import Trajectories

BINS = 80
"""Of the histograms of energy."""


def token_charts(
    config: Config, environment: str, annotated: Trajectories, diagnostics: Mapping[str, Any]
) -> Iterator[Chart]:
    """The charts of the reference policy's annotated episodes in an environment, and of their Action Bottleneck."""
    run = (
        f"Run: {environment} ({config.environments[environment].id}), {diagnostics['groups']} groups of "
        f"{diagnostics['group_size']} episodes of the reference policy, sampled at temperature "
        f"{config.rollout.temperature:g}; {diagnostics['tokens']:,} sampled tokens."
    )
    yield Chart(
        f"{environment}-bottleneck",
        "Token energy and return variance",
        "Does a group's mean token energy go with the variance of its returns? A point per group: the mean energy of its "
        "action, reasoning or all response tokens, against the variance. Hollow: groups with equal returns, "
        f"{diagnostics['zero_variance_groups']} of {diagnostics['groups']}. Energy is −logsumexp of the reference policy's "
        "logits; to the right it is less confident. ρ is Spearman's rank correlation with its 95 % bootstrap interval "
        f"over groups; the table has it without the hollow ones too. {run}",
        {"all": _scatter(annotated, diagnostics)},
    )
    yield Chart(
        f"{environment}-energy",
        "Energy by role",
        "How the energies of a role's sampled tokens are distributed, each row to a height of its own; lines mark the quartiles. "
        f"The outermost bins hold what lies beyond. {run}",
        {"all": _histograms(annotated, diagnostics)},
    )


def _scatter(annotated: Trajectories, diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    found = group_energy(annotated)
    titles = [f"{scope} tokens: {rho_text(diagnostics[scope])}" for scope in SCOPES]
    figure = make_subplots(len(SCOPES), 1, shared_xaxes=True, vertical_spacing=0.08, subplot_titles=titles)
    varying = found.variance > 0
    for row, scope in enumerate(SCOPES, start=1):
        colour = GREY if scope == "response" else ROLE_COLOURS[scope]
        for members, symbol in ((varying, "circle"), (~varying, "circle-open")):
            chosen = np.flatnonzero(members & np.isfinite(found.energy[scope]))
            figure.add_scatter(
                x=_rounded(found.energy[scope][chosen]), y=_rounded(found.variance[chosen]), mode="markers",
                customdata=(chosen + 1).tolist(), marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.6},
                hovertemplate="group %{customdata}<br>energy %{x:.3f}<br>variance %{y:.3f}<extra></extra>",
                showlegend=False, row=row, col=1,
            )  # fmt: skip
    figure.update_xaxes(title_text="mean energy (nats)", row=len(SCOPES))
    figure.update_yaxes(title_text="variance of returns")
    return _titled(figure, 640, left=60)


def _histograms(annotated: Trajectories, diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    energies, low, high = energies_by_role(annotated)
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    titles = [
        f"{role.replace('_', ' ')}: {len(values):,} tokens, {len(values) / diagnostics['tokens']:.1%}, median "
        f"{diagnostics['energy_by_role'][role]['q50']:.2f}"
        for role, values in energies.items()
    ]
    figure = make_subplots(len(energies), 1, shared_xaxes=True, vertical_spacing=0.07, subplot_titles=titles)
    for row, (role, values) in enumerate(energies.items(), start=1):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        figure.add_bar(
            x=_rounded((edges[:-1] + edges[1:]) / 2), y=_rounded(counts / counts.max()), customdata=counts.tolist(),
            marker={"color": ROLE_COLOURS[role], "line": {"width": 0}}, showlegend=False, row=row, col=1,
            hovertemplate="energy %{x:.2f}: %{customdata:,} tokens<extra></extra>",
        )  # fmt: skip
        for quantile, width in (("q25", 1), ("q50", 2.5), ("q75", 1)):
            at = diagnostics["energy_by_role"][role][quantile]
            figure.add_vline(x=at, line={"color": GREY, "width": width}, row=row, col=1)
    figure.update_layout(bargap=0)
    figure.update_yaxes(showticklabels=False, showgrid=False)
    figure.update_xaxes(title_text="token energy (nats)", row=len(energies))
    return _titled(figure, 70 + 110 * len(energies), left=10)


def _titled(figure: go.Figure, height: int, left: int) -> dict[str, Any]:
    """With room for the first panel's title; titles stand at the left, where they do not leave a narrow screen."""
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    return view(figure, height, left, top=30)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
