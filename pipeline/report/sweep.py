"""What the report shows of sweeps: whatever lies in reports/sweep when it is drawn, and their confirmations."""

from collections.abc import Mapping
from typing import Any

from pipeline.workspace.files import read_record, read_text
from pipeline.workspace.layout import Layout


def read_sweeps(layout: Layout) -> list[dict[str, Any]]:
    """A section per study that has been swept: nothing before the first `make sweep`.

    It has ``name``, ``summary``, ``table`` (``header``, ``rows``), ``verdict`` (lines) and ``figures`` (``title``,
    ``caption``, ``plotly``: a figure as JSON).
    """
    sections = []
    for summary in sorted(layout.sweep("*").parent.glob("*/summary.json")):
        folder = summary.parent
        verdict = layout.confirmation(folder.name).reports / "verdict.txt"
        outcome, drawn = read_record(summary), read_record(folder / "figures.json")
        sections.append(
            {
                "name": folder.name,
                # Indented lines are what the table has.
                "summary": "\n".join(line for line in drawn["summary"].splitlines() if not line.startswith("  ")),
                "table": _table(outcome),
                "verdict": read_text(verdict).splitlines() if verdict.exists() else [],
                "figures": drawn["figures"],
            }
        )
    return sections


def _table(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Baselines and the best of every search, a column per setting."""
    points = [
        (search["method"], name, point)
        for search in outcome["searches"]
        for name, point in {**search["baselines"], "best": search["best"]}.items()
        if point is not None
    ]
    keys = list(dict.fromkeys(key for _, _, point in points for key in point["settings"]))
    return {
        "header": ["method", "settings", "validation success", "trial", *keys],
        "rows": [
            [
                method,
                name,
                f"{point['score']:.3f}",
                str(point["number"]),
                *(_cell(point["settings"].get(k)) for k in keys),
            ]
            for method, name, point in points
        ],
    }


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
