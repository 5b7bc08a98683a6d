"""Two revisions of one comparison beside each other: success of every method, paired differences, changed settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.analysis.comparison import headline
from pipeline.analysis.intervals import Grid
from pipeline.analysis.scores import balanced_scores, paired_grid
from pipeline.analysis.verdicts import Difference, judge
from pipeline.settings.credentials import committed_secrets
from pipeline.workspace.addresses import HIDDEN, redacted


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
    paired: Difference | None = None
    """Over the seeds in common; None where the two could not be paired."""
    states: int = 0
    """Initial states in common; 0 if not paired."""


def changes(a: Revision, b: Revision) -> dict[tuple[str, str], Change]:
    """(environment, method) -> B minus A at the headline temperature, of all methods that both revisions have.

    Paired over common seeds and states if both revisions' episodes are there, and then judged together, as one family:
    whoever lays two revisions beside each other looks at all of them. What counts as equal is B's ``smallest_effect``.
    Not paired, a change is the difference of the two means, without a verdict: without the episodes, or if the revisions
    have another headline temperature, no common seed, or no common initial state.
    """
    old, new = (headline(revision.comparison) for revision in (a, b))
    shared = [(place, method) for place in old for method in old[place] if method in new.get(place, {})]
    grids = {key: grid for key in shared if (grid := _paired(a, b, *key)) is not None}
    settings = {"smallest_effect": b.comparison["smallest_effect"]} if "smallest_effect" in b.comparison else {}
    judged = dict(zip(grids, judge(list(grids.values()), **settings), strict=True))
    for (place, method), found in judged.items():
        alarmed = tuple(name for name, rows in (("A", old), ("B", new)) if "alarms" in rows[place][method])
        judged[place, method] = replace(found, alarmed=alarmed)
    return {
        (place, method): Change(judged[place, method].value, judged[place, method], grids[place, method].shape[1])
        if (place, method) in judged
        else Change(new[place][method]["success_mean"] - old[place][method]["success_mean"])
        for place, method in shared
    }


def _paired(a: Revision, b: Revision, environment: str, method: str) -> Grid | None:
    """B minus A, by seed and state; None where the two cannot be paired."""
    old, new = (headline(revision.comparison)[environment][method] for revision in (a, b))
    tables = [r.episodes[environment, method] for r in (a, b) if (environment, method) in r.episodes]
    if old["temperature"] != new["temperature"] or len(tables) < 2:
        return None
    try:
        x, y = (balanced_scores(table, old["temperature"]) for table in tables)
        return paired_grid(y, x)
    except ValueError:
        return None


def changed_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Dotted key, value in A and value in B of every setting that differs; a dash where there is none."""
    old, new = dict(_flat(a)), dict(_flat(b))
    return [
        (key, _shown(old, key), _shown(new, key))
        for key in sorted({*old, *new})
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    """What an earlier revision has had in its params file may be what no params file may have now."""
    if key not in values:
        return "–"
    return HIDDEN if committed_secrets({key: values[key]}, "") else redacted(str(values[key]))
