"""The trees that episodes make where they branch from each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.trajectories.records import rounded
from pipeline.trajectories.trajectory import Role, Trajectories


def branched_from(trajectories: Trajectories, rows: Sequence[int]) -> dict[int, int]:
    """Branch -> the episode that it branched from, by their indices; only where the table bears it out.

    That one must be among ``rows``, begin with the same ``split`` tokens, and have a lower split itself: so there are no
    circles. An episode whose parent is otherwise is left out, as if it were a root.
    """
    columns, splits = trajectories.episodes, trajectories.splits
    named: dict[str, int] = {}
    for row in rows:
        named.setdefault(columns["episode_id"][row], row)

    def shares(row: int, parent: int) -> bool:
        own, other = (trajectories.input_ids[trajectories.tokens(e)] for e in (row, parent))
        split = splits[row]
        fits = max(splits[parent], 0) < split <= min(len(own), len(other))
        return bool(fits and np.array_equal(own[:split], other[:split]))

    parents = {row: named[columns["parent"][row]] for row in rows if columns["parent"][row] in named}
    return {row: parent for row, parent in parents.items() if shares(row, parent)}


def outline(trajectories: Trajectories, rows: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """A drawing of the trees that some episodes make, without their texts.

    Returns:
        The episodes from top to bottom, and columns of them in that order: ``id``; ``parent`` (its place in this order) and
        ``split``, null for a root; ``role`` of the parent's token at the split, null if it has none there; ``length`` in
        tokens; ``ends`` of its turns in tokens, the shared ones too; ``return``; ``success``. ``strays`` is the number of
        episodes that are roots because ``branched_from`` leaves them out. A line from ``split`` to ``length`` in its own
        row for each, and down to it from its parent's row at ``split``, crosses no other line.
    """
    parents, splits, columns = branched_from(trajectories, rows), trajectories.splits, trajectories.episodes
    order = _top_down(rows, parents, splits)
    place = {row: number for number, row in enumerate(order)}
    bounds = trajectories.turn_offsets
    return order, {
        "id": [columns["episode_id"][row] for row in order],
        "parent": [place[parents[row]] if row in parents else None for row in order],
        "split": [int(splits[row]) if row in parents else None for row in order],
        "role": [_role(trajectories, parents[row], int(splits[row])) if row in parents else None for row in order],
        "length": trajectories.lengths[order].tolist(),
        "ends": [trajectories.turns["end"][bounds[row] : bounds[row + 1]] for row in order],
        "return": [rounded(columns["return"][row]) for row in order],
        "success": [bool(columns["success"][row]) for row in order],
        "strays": sum(columns["parent"][row] is not None and row not in parents for row in order),
    }


def _top_down(rows: Sequence[int], parents: Mapping[int, int], splits: np.ndarray) -> list[int]:
    """Parents above their branches, a later split above an earlier one: no branch then has to cross another."""
    branches: dict[int | None, list[int]] = {}
    for row in rows:
        branches.setdefault(parents.get(row), []).append(row)
    order, waiting = [], branches.get(None, [])[::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += sorted(branches.get(order[-1], []), key=lambda row: (splits[row], -row))
    return order


def _role(trajectories: Trajectories, episode: int, position: int) -> str | None:
    found = trajectories.role[trajectories.tokens(episode)][position:]
    return Role(found[0]).name.lower() if len(found) else None
