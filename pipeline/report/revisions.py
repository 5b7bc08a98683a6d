"""Two revisions of one comparison beside each other: success of every method, paired differences, changed settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.evaluation import statistics
from pipeline.evaluation.statistics import Interval
from pipeline.randomness import generator


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
class Difference:
    """Success in B minus success in A, of one method."""

    value: float
    interval: Interval | None
    """None where the two could not be paired."""
    seeds: int = 0
    """Seeds in common; 0 if not paired."""
    states: int = 0
    """Initial states in common; 0 if not paired."""


def headline(revision: Revision) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Environment -> method -> its row of the comparison at the headline temperature."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in revision.comparison["rows"]:
        if row["headline"]:
            found.setdefault(row["environment"], {})[row["method"]] = row
    return found


def difference(a: Revision, b: Revision, environment: str, method: str, resamples: int) -> Difference:
    """B minus A at the headline temperature: paired over common seeds and states if both revisions' episodes are there.

    Not paired, it is the difference of the two means, without an interval: without the episodes, or if the revisions
    have another headline temperature, no common seed, or no common initial state.
    """
    rows = [headline(revision)[environment][method] for revision in (a, b)]
    means = Difference(rows[1]["success_mean"] - rows[0]["success_mean"], None)
    tables = [revision.episodes.get((environment, method)) for revision in (a, b)]
    if rows[0]["temperature"] != rows[1]["temperature"] or tables[0] is None or tables[1] is None:
        return means
    temperature = rows[0]["temperature"]
    try:
        x, y = (statistics.balanced_scores(table, temperature) for table in tables)
        paired = statistics.paired_difference(
            y, x, resamples, generator(0, "revisions", environment, f"{temperature:g}")
        )
    except ValueError:
        return means
    return Difference(paired.value, paired.interval, paired.seeds, len({*x.states} & {*y.states}))


def changed_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Dotted key, value in A and value in B of every setting that differs; a dash where there is none."""
    old, new = dict(_flat(a)), dict(_flat(b))
    return [
        (key, _shown(old, key), _shown(new, key))
        for key in sorted({*old, *new})
        if key not in old or key not in new or old[key] != new[key]
    ]


def revisions_text(a: Revision, b: Revision, resamples: int) -> str:
    """Both revisions for a terminal: a table per environment, and the settings that changed."""
    rows_a, rows_b = headline(a), headline(b)
    parts = [f"A: {a.name}\nB: {b.name}"]
    for environment in dict.fromkeys([*rows_a, *rows_b]):
        mine, theirs = rows_a.get(environment, {}), rows_b.get(environment, {})
        temperatures = sorted({row["temperature"] for row in (*mine.values(), *theirs.values())})
        lines, unpaired = [["method", "A", "B", "B − A", "paired over"]], []
        for method in dict.fromkeys([*mine, *theirs]):
            change, over = "–", "–"
            if method in mine and method in theirs:
                found = difference(a, b, environment, method, resamples)
                change = f"{found.value:+.3f}{_bounds(found.interval, '+')}"
                over = f"{found.seeds} seeds × {found.states} states" if found.interval else "–"
                unpaired += [] if found.interval else [method]
            lines.append([method, _success(mine.get(method)), _success(theirs.get(method)), change, over])
        text = (
            f"{environment}, success at temperature {' and '.join(f'{t:g}' for t in temperatures)}\n{_aligned(lines)}"
        )
        if unpaired:
            text += (
                f"\nnot paired, a difference of means without an interval: {', '.join(unpaired)} (episodes of one "
                "revision are not in the cache, or there is no common seed, state or temperature)"
            )
        parts.append(text)
    changes = changed_settings(a.params, b.params)
    shown = _aligned([["changed setting", "A", "B"], *map(list, changes)])
    return "\n\n".join([*parts, shown if changes else "no setting changed"]) + "\n"


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
    return f"{row['success_mean']:.3f}{_bounds(Interval(row['success_ci_low'], row['success_ci_high']))}"


def _bounds(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
