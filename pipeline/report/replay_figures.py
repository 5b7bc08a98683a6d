"""The replay as a table for a terminal, and as a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.report.style import DASHES, MARKERS, METHOD_COLOURS, QUIET, STYLE, WIDTH, save
from pipeline.report.tables import aligned

MEASURES = {
    "snr": "signal-to-noise ratio\n± jackknife standard error over groups",
    "cosine_many": "cosine, an iteration with other groups",
    "cosine_uniform": "cosine with the uniform gradient",
    "share_action": "gradient share of action tokens",
}


def replay_text(result: Mapping[str, Any]) -> str:
    """A line per point of the grid; the uniform weights' numbers on top. It is all about one policy's gradient."""
    uniform = result["uniform"]
    header = ["alpha", "beta", "tau", "signal", "cos uniform", "cos many", "SNR", "action", "reasoning", "tag", "other"]
    rows = [
        [
            f"{row['alpha']:g}", f"{row['beta']:g}", *((f"{row['tau']:g}", row["signal"]) if row["beta"] else ("-", "-")),
            *(f"{row[key]:.3f}" for key in ("cosine_uniform", "cosine_many")), f"{row['snr']:.2f} ± {row['snr_error']:.2f}",
            *(f"{row[f'share_{role}']:.0%}" for role in ("action", "reasoning", "tag", "other")),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = (
        f"{result['groups']} groups, advantages of {result['method']}; uniform weights: cos many "
        f"{uniform['cosine_many']:.3f}, SNR {uniform['snr']:.2f} ± {uniform['snr_error']:.2f} (jackknife standard "
        "error over groups of the reference policy alone, which says nothing of trainings)"
    )
    return f"{head}\n{aligned([header, *rows])}\n"


def draw_replay(result: Mapping[str, Any], target: Path) -> tuple[Path, Path]:
    """Each measure over alpha, a line per (beta, tau, signal); written as PNG and SVG.

    Colour is the signal, the marker beta, the dash tau. ``cosine_many`` is between an iteration's weighted gradient and
    the uniform one of all other groups.
    """
    lines: dict[tuple[float, float, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault((row["beta"], row["tau"], row["signal"]), []).append(row)
    signals, betas, taus = (
        list(dict.fromkeys(row[key] for row in result["rows"])) for key in ("signal", "beta", "tau")
    )
    dashes, markers = list(DASHES), list(MARKERS)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 8), layout="constrained")
        for axes, (measure, title) in zip(figure.subplots(2, 2).flat, MEASURES.items(), strict=True):
            for (beta, tau, signal), rows in lines.items():
                rows.sort(key=lambda row: row["alpha"])
                x, y, error = ([row[key] for row in rows] for key in ("alpha", measure, "snr_error"))
                colour = METHOD_COLOURS[signals.index(signal) % len(METHOD_COLOURS)] if beta else "black"
                whiskers: dict[str, Any] = {"ecolor": (colour, 0.5), "elinewidth": 0.8, "capsize": 2}
                axes.errorbar(
                    x,
                    y,
                    error if measure == "snr" else None,
                    color=colour,
                    **whiskers,
                    marker=markers[betas.index(beta) % len(markers)],
                    linestyle=dashes[taus.index(tau) % len(dashes)] if beta else "-",
                    label=f"β {beta:g}, τ {tau:g}, {signal}" if beta else "β 0",
                )
            if measure in result["uniform"]:
                axes.axhline(result["uniform"][measure], color=QUIET, linestyle=":", label="uniform weights")
            axes.set(xlabel="α, weight of reasoning tokens", ylabel=title)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.suptitle(f"What reweighting changes: {result['groups']} groups, advantages of {result['method']}")
        return save(figure, target)
