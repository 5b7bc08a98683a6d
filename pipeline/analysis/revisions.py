"""Two revisions of one comparison beside each other: success of every method, paired differences, changed settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.analysis import statistics
from pipeline.analysis.differences import NO_VERDICT, difference_text
from pipeline.analysis.statistics import VERDICT_SEEDS


@dataclass(frozen=True)
class Revision:
    """What one revision holds."""

    name: str
    """As the user wrote it."""
    params: Mapping[str, Any]
    """Its params file, parsed and not resolved."""
    comparison: Mapping[str, Any]
    """Its reports/comparison.json."""
    episodes: Mapping[tuple[str, str], pa.Table]
    """(environment, method) -> per-episode results; those that could not be read are absent."""


@dataclass(frozen=True)
class Change:
    """Success in B minus success in A, of one method."""

    value: float
    paired: statistics.Difference | None = None
    """Over the seeds in common; None where the two could not be paired."""
    states: int = 0
    """Initial states in common; 0 if not paired."""


def headline(revision: Revision) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Environment -> method -> its row of the comparison at the headline temperature."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in revision.comparison["rows"]:
        if row["headline"]:
            found.setdefault(row["environment"], {})[row["method"]] = row
    return found


def change(a: Revision, b: Revision, environment: str, method: str) -> Change:
    """B minus A at the headline temperature: paired over common seeds and states if both revisions' episodes are there.

    Not paired, it is the difference of the two means, without a verdict: without the episodes, or if the revisions have
    another headline temperature, no common seed, or no common initial state.
    """
    rows = [headline(revision)[environment][method] for revision in (a, b)]
    means = Change(rows[1]["success_mean"] - rows[0]["success_mean"])
    tables = [revision.episodes.get((environment, method)) for revision in (a, b)]
    if rows[0]["temperature"] != rows[1]["temperature"] or tables[0] is None or tables[1] is None:
        return means
    temperature = rows[0]["temperature"]
    try:
        x, y = (statistics.balanced_scores(table, temperature) for table in tables)
        paired = statistics.paired_difference(y, x)
    except ValueError:
        return means
    return Change(paired.value, paired, len({*x.states} & {*y.states}))


def changed_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Dotted key, value in A and value in B of every setting that differs; a dash where there is none."""
    old, new = dict(_flat(a)), dict(_flat(b))
    return [
        (key, _shown(old, key), _shown(new, key))
        for key in sorted({*old, *new})
        if key not in old or key not in new or old[key] != new[key]
    ]


def revisions_text(a: Revision, b: Revision) -> str:
    """Both revisions for a terminal: a table per environment, and the settings that changed."""
    rows_a, rows_b = headline(a), headline(b)
    parts = [f"A: {a.name}\nB: {b.name}"]
    for environment in dict.fromkeys([*rows_a, *rows_b]):
        mine, theirs = rows_a.get(environment, {}), rows_b.get(environment, {})
        temperatures = sorted({row["temperature"] for row in (*mine.values(), *theirs.values())})
        lines, unpaired, few = [["method", "A", "B", "B − A", "paired over"]], [], []
        for method in dict.fromkeys([*mine, *theirs]):
            shown, over = "–", "–"
            if method in mine and method in theirs:
                found = change(a, b, environment, method)
                if found.paired is None:
                    shown = f"{found.value:+.3f}"
                    unpaired.append(method)
                else:
                    shown = difference_text(found.paired)
                    over = f"{len(found.paired.by_seed)} seeds × {found.states} states"
                    few += [] if found.paired.verdict else [method]
            lines.append([method, _success(mine.get(method)), _success(theirs.get(method)), shown, over])
        text = (
            f"{environment}, success at temperature {' and '.join(f'{t:g}' for t in temperatures)}: A and B with 95 % "
            f"bootstrap intervals over seeds and states, B − A with the 95 % t-interval over paired seeds\n"
            f"{_aligned(lines)}"
        )
        if few:
            text += f"\n{NO_VERDICT}: {', '.join(few)}; give `seeds` {VERDICT_SEEDS} or more in both revisions, the same ones"
        if unpaired:
            text += (
                f"\nnot paired, a difference of means without a verdict: {', '.join(unpaired)} (episodes of one "
                "revision are not in the cache, or there is no common seed, state or temperature)"
            )
        parts.append(text)
    changes = changed_settings(a.params, b.params)
    settings = _aligned([["changed setting", "A", "B"], *map(list, changes)])
    return "\n\n".join([*parts, settings if changes else "no setting changed"]) + "\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "–"


def _success(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['success_mean']:.3f} [{row['success_ci_low']:.3f}, {row['success_ci_high']:.3f}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
