"""What the trajectory viewer shows: episodes of every method and of the reference policy, some of one initial state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError
from pipeline.environments.registry import board_of, make
from pipeline.episodes import NUMBERS, episode_records
from pipeline.prompting import plain_text
from pipeline.report.comparison import REFERENCE
from pipeline.trajectory import Trajectories, TrajectoryError, read


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
            ConfigError: it has no tokenizer.json.
        """
        file = policy / "tokenizer.json"
        if not file.exists():
            raise ConfigError(f"{file}: no such file; `dvc repro` makes it")
        return cls(Tokenizer.from_file(str(file)))


def read_played(path: Path) -> Played:
    """Read the episodes of a training's last iteration (``training.episodes.write_episodes``).

    Raises:
        TrajectoryError: as ``trajectory.read``.
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
        tokenizer: what ``prompting.decode`` takes.
        played: (environment, method) -> all that may be chosen from.

    Returns:
        The records of ``episode_records``; each turn has ``board`` (rows of cells, or null), each episode ``letter``, a
        name of its initial state within the environment.
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
            found.setdefault(environment, {})[method] = records
    return {environment: methods for environment, methods in found.items() if any(methods.values())}


def choose(played: Mapping[str, Played], states: int, episodes: int) -> dict[str, list[int]]:
    """Which episodes of each method to show: of the initial states whose returns vary most, the best and the worst.

    Variances are summed over methods, so that methods which have met the same states show the same ones. Half of a
    state's episodes have its highest returns, half its lowest; the first ones where returns are equal.
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
            chosen[method] += [*best, *worst[::-1]]
    return chosen


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


def read_all_played(config: Config, data: Path, annotated: Mapping[str, Trajectories]) -> dict[tuple[str, str], Played]:
    """(environment, method) -> the first seed's last episodes; of the reference policy, that seed's first ones.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    found = {}
    for environment in config.environments:
        for method in config.methods:
            path = data / "episodes" / f"{environment}-{method}.parquet"
            try:
                found[environment, method] = read_played(path)
            except TrajectoryError as error:
                raise ConfigError(f"{error}; `dvc repro` makes it") from None
        table = annotated[environment]
        rows = [i for i, seed in enumerate(table.episodes["seed"]) if seed == config.seeds[0]]
        found[environment, REFERENCE] = Played(table.select(rows), {})
    return found
