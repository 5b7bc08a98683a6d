"""Which signal finds the decision points: a table for a terminal, and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.report.style import ROLE_COLOURS, ROLE_PATTERNS, STYLE, WIDTH, save
from pipeline.report.tables import aligned


def decisions_text(result: Mapping[str, Any]) -> str:
    """A line per signal; the last column is what it explains less what a draw among the same tokens explains.

    The intervals are over initial states, all played by the reference policy: they compare signals, not trainings.
    """
    plan = result["plan"]
    head = (
        f"{result['environment']}: {result['states']} initial states, {plan['positions']} tokens of each per signal, "
        f"{plan['candidates']} candidates x {plan['continuations']} continuations; 95 % bootstrap intervals over states "
        "of the reference policy alone, which say nothing of trainings"
    )
    roles = ("reasoning", "action", "tag", "other")
    lines = [["signal", *roles, "variance decided", "explained", "− a random draw"]]
    for signal, row in result["signals"].items():
        forms = {"between": ".4f", "explained": ".1%", "minus_control": "+.1%"}
        shares = (f"{row['roles'][role]:.0%}" for role in roles)
        lines.append([signal, *shares, *(_estimate(row[key], form) for key, form in forms.items())])
    return f"{head}\n{aligned(lines)}\n"


def _estimate(found: Mapping[str, float] | None, form: str) -> str:
    return "–" if found is None else f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def draw_decisions(result: Mapping[str, Any], target: Path) -> tuple[Path, Path]:
    """Per signal where its branches fall, the variance of returns that they decide, and its share; as PNG and SVG."""
    signals: Mapping[str, Any] = result["signals"]
    rows = range(len(signals))
    with rc_context(STYLE):
        figure = Figure(figsize=(1.2 * WIDTH, 1.6 + 0.45 * len(signals)), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True)
        begun = [0.0] * len(signals)
        for role, pattern in ROLE_PATTERNS.items():
            shares = [row["roles"][role] for row in signals.values()]
            look: dict[str, Any] = {"color": ROLE_COLOURS[role], "hatch": 2 * pattern, "edgecolor": "white"}
            left.barh(rows, shares, left=begun, height=0.6, label=role, **look)
            begun = [b + s for b, s in zip(begun, shares, strict=True)]
        left.set(xlim=(0, 1), xlabel="share of branches by role", yticks=list(rows), yticklabels=list(signals))
        left.invert_yaxis()
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handlelength=1.2)
        for axes, key, label in (
            (middle, "between", "variance of returns that the token decides"),
            (right, "explained", "its share of the variance there"),
        ):
            mean, low, high = (np.array([row[key][p] for row in signals.values()]) for p in ("mean", "low", "high"))
            axes.errorbar(mean, rows, xerr=(mean - low, high - mean), fmt="o", color="black", capsize=3)
            axes.axvline(0, color="0.7", linewidth=0.8)
            axes.set_xlabel(label)
        figure.suptitle(
            f"{result['environment']}: {result['states']} initial states of the reference policy; 95 % bootstrap intervals "
            "over states"
        )
        return save(figure, target)
