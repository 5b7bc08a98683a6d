"""What was said before and is shown after: the registration and its changes, and where a comparison of batches stands."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipeline.analysis.registration import registered_states
from pipeline.report.commits import committed
from pipeline.workspace.layout import Layout

SHORT = 12
"""Digits of a hash that are shown."""


def registration_lines(
    registration: Mapping[str, Any] | None, entries: Sequence[Mapping[str, Any]] = (), date: str = ""
) -> list[str]:
    """The registration in words: what is registered, and a line for every field that has changed since.

    Args:
        registration: ``registration`` of comparison.json; None gives no line.
        entries: its states with their times, as ``registration.journal`` has them. With them, and a date, the lines are
            for the report's foot only: nothing else may depend on times.
        date: of the commit in which ``hypotheses.yaml`` last changed; empty if it is in none.
    """
    if registration is None:
        return []
    first = f"Registered in hypotheses.yaml, SHA-256 {registration['sha256'][:SHORT]}"
    if date:
        first += f", committed {date}"
    elif entries:
        first += f", first seen {entries[0]['at'][:10]}, in no commit"
    if entries and entries[0]["opened"]:
        first += "; test states had been played before"
    changes = registration["changes"]
    lines = [f"{first}. {'Nothing has changed since.' if not changes else 'Changed since:'}"]
    lines += [f"- {change_text(change)}" for change in changes]
    for before, after in pairwise(entries):
        what = "hypotheses.yaml was rewritten" if before["sha256"] != after["sha256"] else "the params file was changed"
        known = "after" if after["opened"] else "before"
        fields = ", ".join(change["field"] for change in after["changes"]) or "nothing"
        lines.append(
            f"- {after['at'][:10]}: {what}, {known} test states had been played; other than registered: {fields}"
        )
    return lines


def registration_foot(comparison: Mapping[str, Any], layout: Layout) -> list[str]:
    """``registration_lines`` with all dates, for the report's foot."""
    entries = registered_states(layout.registered)
    return registration_lines(comparison["registration"], entries, committed(layout.hypotheses))


def registration_warning(registration: Mapping[str, Any] | None) -> str | None:
    """One line that names what is not as registered; None if nothing is."""
    changes = [] if registration is None else registration["changes"]
    if not changes:
        return None
    return f"not as registered in hypotheses.yaml: {'; '.join(map(change_text, changes))}"


def change_text(change: Mapping[str, Any]) -> str:
    """A changed field with what was registered and what is now; of lists what has gone and what has come."""
    before, after = change["registered"], change["now"]
    if isinstance(before, list) and isinstance(after, list):
        gone = [f"without {_text(item)}" for item in before if item not in after]
        come = [f"with {_text(item)}" for item in after if item not in before]
        return f"{change['field']} {', '.join(gone + come) or 'in another order'}"
    return f"{change['field']} {_text(before)} → {_text(after)}"


def exclusion_lines(comparison: Mapping[str, Any]) -> list[str]:
    """A line for every training that is left out of comparisons, with its reason."""
    return [
        f"Left out: {one['environment']}, {one['method']}, seed {one['seed']}: {one['reason']}"
        for one in comparison.get("exclusions", [])
    ]


def declared_lines(comparison: Mapping[str, Any]) -> list[str]:
    """What stands below the answers: where looks stand, what is left out, and what was registered."""
    look = look_line(comparison)
    registered = registration_lines(comparison.get("registration"))
    return [*([look] if look else []), *exclusion_lines(comparison), *registered]


def look_line(comparison: Mapping[str, Any]) -> str | None:
    """Where a comparison stands whose seeds are added until it is decided; None of one with a list of seeds."""
    look = comparison.get("look")
    if look is None:
        return None
    where = f"Look {look['number']} of {look['of']}: {look['seeds']} of at most {look['at_most']} seeds"
    if look["decided"]:
        return f"{where}, judged at {look['level']:.2%}. Decided."
    if look["seeds"] == look["at_most"]:
        return f"{where}, judged at {look['level']:.2%}. Not decided, and this was the last look."
    judged = f"judged at {look['level']:.2%}" if look["level"] else "too few for any verdict"
    return f"{where}, {judged}. Not decided yet: `make repro` adds {look['next_seeds'] - look['seeds']} seeds."


def _text(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
