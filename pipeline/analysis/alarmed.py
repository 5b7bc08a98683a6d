"""Which trainings have alarmed: read from their learning curves, where each training has said it itself."""

from collections.abc import Mapping
from typing import Any

from pipeline.analysis.curves import Curves
from pipeline.analysis.scores import significant
from pipeline.settings.alarms import PREFIX


def alarms_of(curves: Curves) -> dict[str, dict[str, Any]]:
    """Name of an alarm -> ``seeds`` that have raised it, the first ``iteration`` in which one did, and its ``value`` there."""
    found: dict[str, dict[str, Any]] = {}
    for iteration in range(max(len(rows) for rows in curves.values())):
        for seed, rows in curves.items():
            row = rows[iteration] if iteration < len(rows) else {}
            for key, value in row.items():
                if not key.startswith(PREFIX):
                    continue
                first: dict[str, Any] = {"seeds": [], "iteration": iteration, "value": significant(value)}
                one = found.setdefault(key.removeprefix(PREFIX), first)
                one["seeds"] += [] if seed in one["seeds"] else [seed]
    return found


def row_alarms(curves: Curves | None) -> dict[str, Any]:
    """What a comparison's row has of a method's alarms: nothing where there were none."""
    found = {} if curves is None else alarms_of(curves)
    seeds = {seed for one in found.values() for seed in one["seeds"]}
    return {"alarms": found, "alarmed_seeds": len(seeds)} if found else {}


def alarmed(curves: Mapping[str, Curves]) -> dict[str, list[str]]:
    """Method -> the seeds whose trainings have alarmed, of those methods that have such seeds."""
    seeds = {
        method: [seed for seed, rows in own.items() if any(key.startswith(PREFIX) for row in rows for key in row)]
        for method, own in curves.items()
    }
    return {method: own for method, own in seeds.items() if own}
