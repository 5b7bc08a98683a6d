"""Schedules on 1 to 1,024 devices, drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.planning.schedules import KINDS, Schedule, Timeline
from pipeline.report.plan import NAMES
from pipeline.report.style import METHOD_COLOURS, STYLE, WIDTH, save

DEVICES = tuple(2**power for power in range(11))
"""Whose schedules are drawn."""

Simulated = Callable[[Schedule, int, float], Timeline | None]
"""A schedule's run on so many devices, with a spread of episode lengths; None where there are too few."""


def draw_schedules(
    simulated: Simulated, spread: float, title: str, target: Path, devices: Sequence[int] = DEVICES
) -> tuple[Path, Path]:
    """Seconds of an iteration, and the share of time in which devices compute, over their number; as PNG and SVG.

    Solid with a spread of episode lengths, dashed with episodes that all have the mean length.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for kind, colour in zip(KINDS, METHOD_COLOURS, strict=False):
            for own, dash in ((spread, "-"), (0.0, "--")):
                runs = {count: run for count in devices if (run := simulated(kind, count, own)) is not None}
                label = NAMES[kind] if own else None
                left.plot(list(runs), [run.iteration for run in runs.values()], dash, color=colour, label=label)
                right.plot(list(runs), [run.busy for run in runs.values()], dash, color=colour)
        left.set(xscale="log", yscale="log", xlabel="devices", ylabel="seconds of an iteration")
        right.set(xscale="log", xlabel="devices", ylabel="share of time in which devices compute", ylim=(0, 1.02))
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:.3g}")
        figure.legend(loc="outside lower center", ncols=len(KINDS))
        figure.suptitle(
            f"{title}\nsolid: episode lengths with a spread of {spread:.2g}; dashed: all of the mean length"
        )
        return save(figure, target)
