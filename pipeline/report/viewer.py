"""What the trajectory viewer shows: episodes of every method and of the reference policy, some of one initial state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from pipeline.analysis.examples import Played, choose
from pipeline.analysis.trees import outline
from pipeline.environments.making import make
from pipeline.environments.playing import board_of
from pipeline.settings.params import Config
from pipeline.trajectories.prompting import plain_text
from pipeline.trajectories.records import episode_records
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.errors import UserError, line_of
from pipeline.workspace.manifest import require_listed


@dataclass(frozen=True)
class SavedTokenizer:
    """As much of a transformers tokenizer as decoding asks for; transformers itself takes seconds to import."""

    backend_tokenizer: Tokenizer

    @classmethod
    def load(cls, policy: Path) -> Self:
        """From a policy's directory.

        Raises:
            UserError: it has no tokenizer.json, or that is damaged.
        """
        file = policy / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{file}: no such file; `dvc repro` makes it")
        require_listed(policy, file)
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:  # the library has no other class for what is no tokenizer
            raise UserError(f"{file}: no tokenizer: {line_of(error)}") from None


def viewer_data(
    config: Config, tokenizer: Any, played: Mapping[tuple[str, str], Played]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Environment -> method -> records of the chosen episodes, ready to be written as JSON.

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


def _branching(trajectories: Trajectories, chosen: Sequence[int]) -> dict[int, list[int]]:
    """Place of an initial state's first chosen episode -> all its episodes; nothing where no episode is a branch."""
    if not any(trajectories.episodes["parent"]):
        return {}
    keys = trajectories.episodes["state_key"]
    first: dict[str, int] = {}
    for place, episode in enumerate(chosen):
        first.setdefault(keys[episode], place)
    return {place: [row for row, key in enumerate(keys) if key == state] for state, place in first.items()}


def _forest(trajectories: Trajectories, rows: Sequence[int], chosen: Sequence[int]) -> dict[str, Any]:
    order, drawn = outline(trajectories, rows)
    places = {episode: place for place, episode in enumerate(chosen)}
    return {**drawn, "episode": [places.get(row) for row in order]}


def _of(trajectories: Trajectories, values: np.ndarray, episodes: Sequence[int]) -> np.ndarray:
    """A per-token column of some episodes, in their order."""
    return np.concatenate([values[:0], *(values[trajectories.tokens(e)] for e in episodes)])


def _plain_board(rows: list[list[str]] | None) -> list[list[str]] | None:
    return None if rows is None else [[plain_text(cell) for cell in row] for row in rows]


def _letter(number: int) -> str:
    """A, B, ... Z, then A2, B2, ..."""
    lap, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(lap + 1) if lap else "")
