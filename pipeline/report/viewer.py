"""What the trajectory viewer shows: episodes of every method and of the reference policy, some of one initial state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipeline.analysis.comparison import REFERENCE
from pipeline.environments.making import make
from pipeline.environments.playing import board_of
from pipeline.settings.params import Config
from pipeline.trajectories.prompting import plain_text
from pipeline.trajectories.records import NUMBERS, episode_records, rounded
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import Role, Trajectories, TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Layout


@dataclass(frozen=True)
class Played:
    """Episodes of one policy."""

    trajectories: Trajectories
    columns: Mapping[str, np.ndarray]
    """What the update made of their tokens: names of ``episodes.NUMBERS``, a number per token, NaN where none."""


@dataclass(frozen=True)
class SavedTokenizer:
    """As much of a transformers tokenizer as decoding asks for; transformers itself takes seconds to import."""

    backend_tokenizer: Tokenizer

    @classmethod
    def load(cls, policy: Path) -> SavedTokenizer:
        """From a policy's directory.

        Raises:
            UserError: it has no tokenizer.json.
        """
        file = policy / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{file}: no such file; `dvc repro` makes it")
        return cls(Tokenizer.from_file(str(file)))


def read_played(path: Path) -> Played:
    """Read the episodes of a training's last iteration (``training.episodes.update_columns``).

    Raises:
        TrajectoryError: as ``table.read``.
    """
    trajectories = read(path)
    names = [name for name in NUMBERS if name in pq.read_schema(path).names and not hasattr(trajectories, name)]
    table = pq.read_table(path, columns=names).combine_chunks()
    return Played(trajectories, {n: table.column(n).chunk(0).flatten().to_numpy(zero_copy_only=False) for n in names})


def viewer_data(
    config: Config, tokenizer: Any, played: Mapping[tuple[str, str], Played]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Environment -> method -> records of the chosen episodes, ready to be written as JSON.

    Args:
        config: ``report`` says how many episodes of how many initial states.
        tokenizer: what ``parsing.decode`` takes.
        played: (environment, method) -> all that may be chosen from.

    Returns:
        The records of ``episode_records``; each turn has ``board`` (rows of cells, or null), each episode ``letter``, a
        name of its initial state within the environment. Where a method has branches, the first record of an initial
        state has its ``forest``: see ``outline``, and ``episode``, per row the place of its record, null if not chosen.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for environment in config.environments:
        own = {method: entry for (place, method), entry in played.items() if place == environment}
        instance, letters = make(config.environments[environment]), dict[str, str]()
        for method, chosen in choose(own, config.report.states, config.report.episodes).items():
            entry = own[method]
            columns = {name: _of(entry.trajectories, values, chosen) for name, values in entry.columns.items()}
            selected = entry.trajectories.select(chosen)
            records = episode_records(selected, tokenizer, columns)
            keys = iter(selected.turns["state_key"])
            for record in records:
                record["letter"] = letters.setdefault(record["state"], _letter(len(letters)))
                for turn in record["turns"]:
                    turn["board"] = _plain_board(board_of(instance, next(keys)))
            for place, rows in _branching(entry.trajectories, chosen).items():
                records[place]["forest"] = _forest(entry.trajectories, rows, chosen)
            found.setdefault(environment, {})[method] = records
    return {environment: methods for environment, methods in found.items() if any(methods.values())}


def choose(played: Mapping[str, Played], states: int, episodes: int) -> dict[str, list[int]]:
    """Which episodes of each method to show: of the initial states whose returns vary most, the best and the worst.

    Variances are summed over methods, so that methods which have met the same states show the same ones. Half of a
    state's episodes have its highest returns, half its lowest; the first ones where returns are equal. What an episode
    branched from is shown too, so that its shared tokens can be read where they were sampled.
    """
    members: dict[str, dict[str, list[int]]] = {}
    for method, entry in played.items():
        for index, state in enumerate(entry.trajectories.episodes["state_key"]):
            members.setdefault(method, {}).setdefault(state, []).append(index)
    spread: dict[str, float] = {}
    for method, groups in members.items():
        returns = played[method].trajectories.returns
        for state, own in groups.items():
            spread[state] = spread.get(state, 0.0) + float(np.var(returns[own]))
    chosen: dict[str, list[int]] = {}
    for method, groups in members.items():
        returns = played[method].trajectories.returns
        chosen[method] = []
        for state in sorted(groups, key=lambda key: -round(spread[key], 9))[:states]:
            ranked = sorted(groups[state], key=lambda index: -returns[index])
            best = ranked[: -(-episodes // 2)]
            worst = [index for index in ranked[::-1] if index not in best][: episodes - len(best)]
            shown = _with_ancestors([*best, *worst], branched_from(played[method].trajectories, groups[state]))
            chosen[method] += [index for index in ranked if index in shown]
    return chosen


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
        own, other = (
            trajectories.input_ids[trajectories.offsets[e] : trajectories.offsets[e + 1]] for e in (row, parent)
        )
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
        "role": [_role(trajectories, parents[row], splits[row]) if row in parents else None for row in order],
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
    found = trajectories.role[trajectories.offsets[episode] + position : trajectories.offsets[episode + 1]]
    return Role(found[0]).name.lower() if len(found) else None


def _with_ancestors(episodes: Sequence[int], parents: Mapping[int, int]) -> set[int]:
    found, waiting = set[int](), list(episodes)
    while waiting:
        episode = waiting.pop()
        if episode not in found:
            found.add(episode)
            waiting += [parents[episode]] if episode in parents else []
    return found


def _branching(trajectories: Trajectories, chosen: Sequence[int]) -> dict[int, list[int]]:
    """Place of an initial state's first chosen episode -> all its episodes; nothing where no episode is a branch."""
    columns = trajectories.episodes
    if not any(parent is not None for parent in columns["parent"]):
        return {}
    first: dict[str, int] = {}
    for place, episode in enumerate(chosen):
        first.setdefault(columns["state_key"][episode], place)
    return {
        place: [row for row, key in enumerate(columns["state_key"]) if key == state] for state, place in first.items()
    }


def _forest(trajectories: Trajectories, rows: Sequence[int], chosen: Sequence[int]) -> dict[str, Any]:
    order, drawn = outline(trajectories, rows)
    places = {episode: place for place, episode in enumerate(chosen)}
    return {**drawn, "episode": [places.get(row) for row in order]}


def _of(trajectories: Trajectories, values: np.ndarray, episodes: Sequence[int]) -> np.ndarray:
    """A per-token column of some episodes, in their order."""
    parts = [values[trajectories.offsets[e] : trajectories.offsets[e + 1]] for e in episodes]
    return np.concatenate(parts) if parts else values[:0]


def _plain_board(rows: list[list[str]] | None) -> list[list[str]] | None:
    return None if rows is None else [[plain_text(cell) for cell in row] for row in rows]


def _letter(number: int) -> str:
    """A, B, ... Z, then A2, B2, ..."""
    lap, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(lap + 1) if lap else "")


def read_all_played(
    config: Config, layout: Layout, annotated: Mapping[str, Trajectories]
) -> dict[tuple[str, str], Played]:
    """(environment, method) -> the first seed's last episodes; of the reference policy, that seed's first ones.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    found = {}
    for environment in config.environments:
        for method in config.methods:
            try:
                found[environment, method] = read_played(layout.episodes(environment, method))
            except TrajectoryError as error:
                raise UserError(f"{error}; `dvc repro` makes it") from None
        table = annotated[environment]
        rows = [i for i, seed in enumerate(table.episodes["seed"]) if seed == config.seeds[0]]
        found[environment, REFERENCE] = Played(table.select(rows), {})
    return found
