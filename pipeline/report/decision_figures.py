"""Which signal finds the decision points: a table for a terminal, and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.report.bottleneck_figures import STYLE

ROLES = {
    "reasoning": ("#0072b2", ""),
    "action": ("#d55e00", "//"),
    "tag": ("#56b4e9", ".."),
    "other": ("#999999", "xx"),
}
"""Colour and hatch, so that no role is told by its colour alone."""


def decisions_text(result: Mapping[str, Any]) -> str:
    """A line per signal; the last column is what it explains less what a draw among the same tokens explains.

    The intervals are over initial states, all played by the reference policy: they compare signals, not trainings.
    """
    plan = result["plan"]
    lines = [
        f"{result['environment']}: {result['states']} initial states, {plan['positions']} tokens of each per signal, "
        f"{plan['candidates']} candidates x {plan['continuations']} continuations; 95 % bootstrap intervals over states "
        "of the reference policy alone, which say nothing of trainings",
        f"{'signal':<17}{'reasoning':>10}{'action':>8}{'tag':>6}{'other':>7}  {'variance decided':<29}"
        f"{'explained':<23}− a random draw",
    ]
    for signal, row in result["signals"].items():
        roles = "".join(f"{row['roles'][role]:>{width}.0%}" for role, width in
                        (("reasoning", 10), ("action", 8), ("tag", 6), ("other", 7)))  # fmt: skip
        decided, explained, beyond = row["between"], row["explained"], row["minus_control"]
        variance = f"{decided['mean']:.4f} [{decided['low']:.4f}, {decided['high']:.4f}]"
        share = f"{explained['mean']:.1%} [{explained['low']:.1%}, {explained['high']:.1%}]"
        more = f"{beyond['mean']:+.1%} [{beyond['low']:+.1%}, {beyond['high']:+.1%}]" if beyond else "–"
        lines.append(f"{signal:<17}{roles}  {variance:<29}{share:<23}{more}")
    return "\n".join(lines) + "\n"


def draw_decisions(result: Mapping[str, Any], target: Path) -> tuple[Path, Path]:
    """Per signal where its branches fall, the variance of returns that they decide, and its share; as PNG and SVG."""
    signals: Mapping[str, Any] = result["signals"]
    rows = range(len(signals))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.6 + 0.45 * len(signals)), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True)
        begun = [0.0] * len(signals)
        for role, (colour, hatch) in ROLES.items():
            shares = [row["roles"][role] for row in signals.values()]
            left.barh(rows, shares, left=begun, height=0.6, color=colour, hatch=hatch, edgecolor="white", label=role)
            begun = [b + s for b, s in zip(begun, shares, strict=True)]
        left.set(xlim=(0, 1), xlabel="share of branches by role", yticks=list(rows), yticklabels=list(signals))
        left.invert_yaxis()
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, handlelength=1.2)
        for axes, key, label in (
            (middle, "between", "variance of returns that the token decides"),
            (right, "explained", "its share of the variance there"),
        ):
            mean, low, high = ([row[key][part] for row in signals.values()] for part in ("mean", "low", "high"))
            errors = [
                [m - lo for m, lo in zip(mean, low, strict=True)],
                [h - m for h, m in zip(high, mean, strict=True)],
            ]
            axes.errorbar(mean, rows, xerr=errors, fmt="o", color="black", capsize=3)
            axes.axvline(0, color="0.7", linewidth=0.8)
            axes.set_xlabel(label)
        figure.suptitle(
            f"{result['environment']}: {result['states']} initial states of the reference policy; 95 % bootstrap intervals "
            "over states"
        )
        paths = target.with_suffix(".png"), target.with_suffix(".svg")
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths
