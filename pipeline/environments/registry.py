"""Making environments by gymnasium id, and splitting their initial states."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol, cast

import gymnasium
import numpy as np

from pipeline.config import ConfigError, Environment

SPLITS = {"demonstrations": 30, "train": 50, "validation": 10, "test": 10}
"""Per cent of all states, by the hash of the state."""

OURS = {
    "actfocus/FrozenLake-v1": "pipeline.environments.frozen_lake:FrozenLake",
    "actfocus/Sokoban-v1": "pipeline.environments.sokoban:Sokoban",
    "actfocus/Sudoku-v1": "pipeline.environments.sudoku:Sudoku",
    "actfocus/Bandit-v1": "pipeline.environments.bandit:Bandit",
}
"""Id -> class; a module is imported when its environment is made."""

for _id, _class in OURS.items():
    gymnasium.register(id=_id, entry_point=_class, disable_env_checker=True)


class TextEnvironment(Protocol):
    """A ``gymnasium.Env`` with text observations and actions, and four attributes.

    ``reset(seed=, options={"state_seed": s})`` draws the initial state from ``state_seed`` and everything that happens
    afterwards from ``seed``, so that the members of a group share the state but not the noise. With no ``state_seed``
    the state is drawn from ``seed`` as well.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]: ...

    @property
    def instructions(self) -> str:
        """The task, its symbols, actions and limits, in the numbers of this instance."""

    @property
    def state_key(self) -> str:
        """The environment's own state, complete enough to tell two states apart."""

    @property
    def success(self) -> bool:
        """Whether the episode has reached its aim."""

    def parse_action(self, text: str) -> str | None:
        """The canonical form of an action that is allowed now, or None."""


def make(environment: Environment) -> TextEnvironment:
    """Construct an environment from its section of ``params.yaml``.

    Raises:
        ConfigError: unknown id, or settings that its constructor refuses.
    """
    try:
        made = gymnasium.make(environment.id, disable_env_checker=True, **environment.settings)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ConfigError(f"environments: id {environment.id!r} cannot be made: {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environments: {environment.id!r} refuses its settings: {error}") from None
    bare = made.unwrapped
    needed = ("instructions", "state_key", "success", "parse_action")
    missing = [n for n in needed if not hasattr(type(bare), n) and n not in vars(bare)]
    if missing:
        raise ConfigError(f"environments: {environment.id!r} lacks {', '.join(missing)} (see TextEnvironment)")
    return cast(TextEnvironment, bare)


def environment_label(environment: Environment) -> str:
    """Id with version, as trajectories record it."""
    return environment.id


def split_of(state_key: str) -> str:
    """The split that an initial state belongs to, by a hash of the state itself: equal states never cross splits."""
    bucket = int.from_bytes(hashlib.blake2b(state_key.encode(), digest_size=8).digest(), "little") % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("shares sum to 100")


def initial_states(
    environment: TextEnvironment, split: str, count: int, draws: np.random.Generator, distinct: bool = False
) -> list[int]:
    """State seeds of ``count`` initial states of a split.

    Args:
        environment: any instance; it is reset.
        split: a key of ``SPLITS``.
        count: how many.
        draws: where candidate seeds come from.
        distinct: refuse a state that is already among them.

    Raises:
        ConfigError: fewer than ``count`` such states turned up in 400 tries for each.
    """
    found: list[int] = []
    seen: set[str] = set()
    for _ in range(400 * count):
        candidate = int(draws.integers(2**31))
        environment.reset(seed=0, options={"state_seed": candidate})
        state = environment.state_key
        if split_of(state) != split or (distinct and state in seen):
            continue
        seen.add(state)
        found.append(candidate)
        if len(found) == count:
            return found
    raise ConfigError(f"environments: only {len(found)} of {count} initial states found in split {split!r}")
