"""Figures of a sweep: Optuna's own, as plotly for the report and as PNG for documents."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import optuna.visualization as interactive
import optuna.visualization.matplotlib as static
from matplotlib import pyplot
from matplotlib.axes import Axes

from pipeline.report.style import PNG, STYLE, WIDTH
from pipeline.settings.sweep import Logarithmic, LogarithmicFromZero
from pipeline.sweep.result import EVALUATORS, SearchResult, report_text, short_names, short_study, summary
from pipeline.sweep.space import from_value, to_value
from pipeline.workspace.files import replacing, write_record

FEWEST = 4
"""Complete trials below which there is nothing to be drawn."""


@dataclass(frozen=True)
class Drawing:
    """One figure of a search."""

    name: str
    title: str
    caption: str
    plot: Callable[[Any], Any]
    """Draws it with Optuna's plotly or matplotlib module."""
    ranged: tuple[str, ...] = ()
    """Settings along its axes, x first."""


def write_figures(found: Sequence[SearchResult], folder: Path) -> None:
    """Write ``figures.json`` (what the report shows of a sweep) and a PNG per figure and method."""
    drawn = []
    for search in found:
        for drawing in drawings(search):
            figure = drawing.plot(interactive)
            _relabel_plotly(figure, search, drawing)
            title = f"{search.plan.method}: {drawing.title}"
            drawn.append({"title": title, "caption": drawing.caption, "plotly": json.loads(figure.to_json())})
            _save(drawing, search, folder / f"{search.plan.method}-{drawing.name}.png")
    write_record(
        folder / "figures.json", {"name": found[0].plan.study, "summary": report_text(found), "figures": drawn}
    )


def drawings(found: SearchResult) -> list[Drawing]:
    """The figures of a search: history, a slice per setting, and, of two settings and more, contours, parallel
    coordinates and importances; of two objectives the front."""
    if len(found.complete) < FEWEST:
        return []
    study, plan = short_study(found), found.plan
    names = list(short_names(list(plan.search.space)).values())
    outcome = summary(found)
    unit = "tokens" if "tokens" in outcome else "episodes"
    ran = (
        f"{plan.environment}, {plan.method}: {len(found.complete)} complete trials of {len(outcome['seeds'])} seeds, "
        f"{outcome[unit]} {unit} a seed; success on validation states, mean over seeds."
    )

    def plot(name: str, **more: Any) -> Callable[[Any], Any]:
        return lambda backend: getattr(backend, f"plot_{name}")(study, target_name="validation success", **more)

    result = [
        Drawing(
            "history",
            "history",
            f"Each trial's score in the order of its number, and the best so far. {ran}",
            plot("optimization_history"),
        ),
        Drawing("slice", "slices", f"Score over each setting, all others varying too. {ran}",
                plot("slice", params=names), tuple(names)),
    ]  # fmt: skip
    if len(names) > 1:
        result += _of_several(names, plot, ran)
    if plan.config.sweep.fewer_tokens:
        result.append(
            Drawing(
                "front",
                "success and tokens",
                f"Trials by success and tokens per episode; the front are those beaten in neither. {ran}",
                lambda backend: backend.plot_pareto_front(
                    short_study(found, tokens=True), target_names=["success", "tokens"]
                ),
            )
        )
    return result


def _of_several(names: Sequence[str], plot: Callable[..., Callable[[Any], Any]], ran: str) -> Iterator[Drawing]:
    """Contours, parallel coordinates and importances of two settings and more."""
    for x, y in combinations(names, 2):
        yield Drawing(
            f"contour-{x}-{y}" if len(names) > 2 else "contour",
            f"contour of {x} and {y}",
            f"Score interpolated between the trials (points), over two settings; others vary too. {ran}",
            plot("contour", params=[x, y]),
            (x, y),
        )
    yield Drawing(
        "parallel",
        "parallel coordinates",
        f"A line per trial through its settings, coloured by score; dotted where it broke a constraint. {ran}",
        plot("parallel_coordinate", params=names),
        tuple(names),
    )
    for title, evaluator in EVALUATORS.items():
        yield Drawing(
            f"importance-{title.lower()}",
            f"importance of the settings by {title}",
            f"Share of the variation of the score that each setting explains, by {title}; the two estimates may "
            f"disagree. {ran}",
            plot("param_importances", evaluator=evaluator),
        )


def _ticks(found: SearchResult, name: str) -> tuple[list[Any], list[str]] | None:
    """Where to write which values along the axis of a logarithmic setting; None for other settings.

    Positions are draws: of a space from zero they are not the values themselves.
    """
    spaces = found.plan.search.space
    space = next(spaces[key] for key, short in short_names(list(spaces)).items() if short == name)
    if not isinstance(space, LogarithmicFromZero | Logarithmic):
        return None
    low = space.scale if isinstance(space, LogarithmicFromZero) else space.low
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(space.high)) + 1)
    round_values = (v for d in decades for v in (10.0**d, 3 * 10.0**d))
    values = [max(v, low) for v in round_values if low <= v * (1 + 1e-9) and v <= space.high]
    values = [0.0, *values] if isinstance(space, LogarithmicFromZero) else values
    return [from_value(space, v) for v in values], [f"{v:g}" for v in values]


def _relabel_plotly(figure: Any, found: SearchResult, drawing: Drawing) -> None:
    figure.update_layout(title=None, margin={"t": 40, "b": 40, "l": 60, "r": 20})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    if drawing.name == "parallel":
        _relabel_parallel(figure, found, drawing.ranged)
        return
    for index, name in enumerate(drawing.ranged):
        ticks = _ticks(found, name)
        if ticks is not None:
            axis = f"xaxis{index + 1 if index else ''}" if drawing.name == "slice" else ("xaxis", "yaxis")[index]
            figure.update_layout({axis: {"tickvals": ticks[0], "ticktext": ticks[1], "tickmode": "array"}})


def _relabel_parallel(figure: Any, found: SearchResult, names: Sequence[str]) -> None:
    """Names in full, and values instead of draws: Optuna's axes are lines beside which texts stand."""
    labels, spaces = ["validation success", *names], [None, *found.plan.search.space.values()]

    def shown(place: int, text: str) -> str:
        space = spaces[place]
        return f"{to_value(space, float(text)):.3g}" if isinstance(space, LogarithmicFromZero) else text

    figure.update_xaxes(ticktext=labels)
    for annotation in figure.layout.annotations:
        annotation.text = shown(int(annotation.x), annotation.text)
    for trace in figure.data:
        if trace.customdata is not None:
            rows = enumerate(trace.customdata)
            trace.customdata = [[labels[place], shown(place, text)] for place, (_, text) in rows]


def _save(drawing: Drawing, found: SearchResult, path: Path) -> None:
    with warnings.catch_warnings(), pyplot.rc_context({**STYLE, "figure.figsize": (WIDTH, 0.6 * WIDTH)}):
        warnings.simplefilter("ignore")
        axes: list[Axes] = list(np.ravel(drawing.plot(static)))
        figure = axes[0].get_figure(root=True)
        assert figure is not None
        if drawing.name == "parallel":
            axes[0].set_xticks(range(1 + len(drawing.ranged)), ["validation success", *drawing.ranged], rotation=15)
        for index, name in enumerate(drawing.ranged):
            ticks = _ticks(found, name)
            if ticks is None:
                continue
            if drawing.name == "slice":
                axes[index].set_xticks(*ticks)
            elif drawing.name == "parallel":  # one axis per setting, after the score's and the colour bar's
                own = figure.axes[index - len(drawing.ranged)]
                low, high = own.get_ylim()
                shown = [(at, text) for at, text in zip(*ticks, strict=True) if low <= at <= high]
                own.set_yticks([at for at, _ in shown], [text for _, text in shown])
                own.minorticks_off()
            elif index == 0:
                axes[0].set_xticks(*ticks)
            else:
                axes[0].set_yticks(*ticks)
        figure.suptitle("")
        for one in axes:
            one.minorticks_off()
            one.set_title("")
        with replacing(path) as partial:
            figure.savefig(partial, format="png", bbox_inches="tight", **PNG)
        pyplot.close("all")
