"""How everything looks: the one palette, fonts and sizes of figures, charts and the page, and the names on them."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.workspace.files import replacing

PALETTE = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "yellow": "#f0e442",
}
"""Okabe and Ito's: told apart with any colour vision."""
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, _ = PALETTE.values()

GREY = "#8a8a8a"
"""Seen on white and on black: on the page, whatever belongs to no method."""
QUIET = "#5f5f5f"
"""On white: small texts, the reference policy, single seeds."""
FAINT = "#d4d4d4"
"""Behind everything else."""

ROLE_COLOURS = {
    "action": VERMILLION,
    "reasoning": BLUE,
    "tag": SKY,
    "think_tag": SKY,
    "answer_tag": ORANGE,
    "other": "#999999",
    "response": "#4d4d4d",
}
PAGE_COLOURS = {**PALETTE, "grey": GREY, **{f"role-{role}": colour for role, colour in ROLE_COLOURS.items()}}
"""Custom property of the page's style sheet -> colour; its scripts read them there."""
ROLE_PATTERNS = {"action": "", "reasoning": "/", "tag": ".", "other": "x"}
"""Roles that are reported together, with hatches, so that no role is told by its colour alone."""

METHOD_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Of the first, second, ... method: those that stand out on white."""
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
}
"""Matplotlib's names, and plotly's."""

CROWD = 8
"""More methods than this get a panel each instead of sharing one."""
WIDTH = 10.0
"""Inches of a figure."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so text has the same width on every machine
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "actfocus",
}
"""Matplotlib's settings."""
PNG: dict[str, Any] = {"dpi": 150, "metadata": {"Software": None}}
"""How a PNG is saved: version and date would make equal figures differ in bytes."""

COSTS = {
    "iterations": "iterations",
    "episodes": "episodes",
    "tokens": "sampled tokens",
    "seconds": "seconds of training",
}
"""What a training spends -> its name on an axis."""
HEALTH = {
    "entropy_action": "Entropy of action tokens (nats)",
    "entropy_reasoning": "Entropy of reasoning tokens (nats)",
    "kl_reference": "KL to the reference (nats per token)",
    "gradient_norm": "Gradient norm before clipping",
    "clip_fraction": "Share of tokens clipped",
    "gradient_share_action": "Share of |c A| on action tokens",
}
"""Keys of the learning curves that show whether a training is healthy, and what they are."""


def looks(plotly: bool = False) -> Iterator[tuple[str, str, str]]:
    """Colour, dash and marker of the first, second, ... method; endless, and no two alike for a long while.

    Dashes and markers are called by plotly's names or by matplotlib's.
    """
    dashes, markers = (list(names.values() if plotly else names) for names in (DASHES, MARKERS))
    for number in count():
        lap, place = divmod(number, len(METHOD_COLOURS))
        yield METHOD_COLOURS[place], dashes[lap % len(dashes)], markers[number % len(markers)]


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write a figure as ``stem.png`` and ``stem.svg``; equal figures are equal bytes. Folders are made."""
    png, svg = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg"))
    with rc_context(STYLE):
        with replacing(png) as partial:
            figure.savefig(partial, format="png", **PNG)
        with replacing(svg) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None, "Creator": None})
    return png, svg
