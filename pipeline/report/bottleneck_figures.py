"""Figures of the Action Bottleneck: energy against return variance, and the energies of every role."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.analysis.bottleneck import SCOPES, GroupEnergy, group_energy, role_energy
from pipeline.report.style import QUIET, ROLE_COLOURS, STYLE, WIDTH, save
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Trajectories

TAIL = 0.1
"""Per cent of a role's tokens at each end that may lie beyond the axis of energy."""
_ENERGY = "energy −logsumexp in nats  (right: reference less confident)"


def draw_bottleneck(trajectories: Trajectories, diagnostics: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``correlations`` and ``energy_by_role`` into a folder; see the two functions below."""
    return [
        *correlation_figure(trajectories, diagnostics, folder / "correlations"),
        *energy_figure(trajectories, diagnostics, folder / "energy_by_role"),
    ]


def correlation_figure(trajectories: Trajectories, diagnostics: dict[str, Any], target: Path) -> tuple[Path, Path]:
    """A panel per scope: a group's mean energy against the variance of its returns, a point per group.

    The target is without its ending.
    """
    per_group = group_energy(trajectories)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.2 * WIDTH, 5), layout="constrained")
        panels = figure.subplots(1, len(SCOPES), sharey=True)
        for axes, scope in zip(panels, SCOPES, strict=True):
            _scatter(axes, per_group, scope, diagnostics[scope])
        panels[0].set_ylabel("variance of the group's returns")
        figure.supxlabel(f"mean {_ENERGY}", fontsize=11)
        figure.suptitle(
            f"{diagnostics['environment']}: {diagnostics['groups']} groups of {diagnostics['group_size']} episodes, "
            f"{diagnostics['zero_variance_groups']} of them with equal returns (hollow)",
            fontsize=13,
        )
        return save(figure, target)


def energy_figure(trajectories: Trajectories, diagnostics: dict[str, Any], target: Path) -> tuple[Path, Path]:
    """A row per role that occurs: the distribution of its tokens' energies on a shared axis, to a height of its own."""
    energies, low, high = energies_by_role(trajectories)
    margin = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, 81)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + 1.05 * len(energies)), layout="constrained")
        rows = figure.subplots(len(energies), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (role, values) in zip(rows, energies.items(), strict=True):
            _histogram(axes, role, values, edges, diagnostics["energy_by_role"][role], diagnostics["tokens"])
        rows[-1].set_xlabel(_ENERGY + "; outermost bins hold what lies beyond")
        figure.suptitle(f"{diagnostics['environment']}: token energy by role, quartiles marked", fontsize=13)
        return save(figure, target)


def energies_by_role(trajectories: Trajectories) -> tuple[dict[str, np.ndarray], float, float]:
    """Energies of the sampled tokens of every role that occurs, and the ends of an axis for them.

    The ends come from each role alone: pooled, a few action tokens would all be a tail of the reasoning.
    """
    found = {role.name.lower(): role_energy(trajectories, role) for role in RESPONSE_ROLES}
    energies = {role: values for role, values in found.items() if len(values)}
    ends = np.array([np.percentile(values, [TAIL, 100 - TAIL]) for values in energies.values()])
    return energies, float(ends[:, 0].min()), float(ends[:, 1].max())


def _scatter(axes: Axes, per_group: GroupEnergy, scope: str, correlation: dict[str, Any]) -> None:
    energy, varying = per_group.energy[scope], per_group.variance > 0
    colour = ROLE_COLOURS[scope]
    axes.scatter(energy[varying], per_group.variance[varying], s=26, color=colour, alpha=0.55, linewidths=0)
    axes.scatter(energy[~varying], per_group.variance[~varying], s=26, facecolors="none", edgecolors=colour, alpha=0.7)
    axes.set_title(f"{scope} tokens\n{rho_text(correlation)}", color=colour, fontweight="bold", loc="center", pad=22)
    varied = correlation["varying"]
    text = f"{varied['groups']} filled: {rho_text(varied)}"
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
    axes.annotate(text, (0.5, 1.0), (0, 7), **above, fontsize=10, color=QUIET)
    axes.locator_params(axis="x", nbins=5)


def rho_text(correlation: Mapping[str, Any]) -> str:
    """Spearman's rank correlation with its interval, in few characters."""
    if correlation["spearman"] is None:
        return "ρ undefined"
    rho, low, high = (
        "?" if correlation[key] is None else f"{correlation[key]:+.2f}".replace("-", "−")
        for key in ("spearman", "ci_low", "ci_high")
    )
    return f"ρ = {rho}  [{low}, {high}]"


def _histogram(
    axes: Axes, role: str, values: np.ndarray, edges: np.ndarray, summary: dict[str, Any], tokens: int
) -> None:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axes.stairs(counts / counts.max(), edges, fill=True, color=ROLE_COLOURS[role], alpha=0.8)
    for quantile, width in (("q25", 1.0), ("q50", 2.2), ("q75", 1.0)):
        axes.axvline(summary[quantile], color="black", linewidth=width, ymax=0.88)
    axes.set(ylim=(0, 1.15), yticks=[], xlim=(edges[0], edges[-1]))
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylabel(role.replace("_", " "), rotation=0, ha="right", va="center", fontweight="bold")
    text = f"{len(values):,} tokens\n{len(values) / tokens:.1%} of sampled\nmedian {summary['q50']:.2f}"
    axes.text(1.01, 0.5, text.replace("-", "−"), transform=axes.transAxes, va="center", fontsize=9.5, color=QUIET)
