"""What our environments share, where their rules are not: when an episode ends, limits of settings, experts that talk."""

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np

from pipeline.environments.draws import spoken


class Episodic(gymnasium.Env[str, str], ABC):
    """An environment whose rules are ``_begin``, ``_act`` and ``parse_action``; it counts the actions itself."""

    observation_space = gymnasium.spaces.Text(max_length=2000)
    action_space = gymnasium.spaces.Text(max_length=100)
    max_actions = 1
    """Actions after which an unfinished episode is cut off."""
    allowed = "what parse_action returned"
    """What an action must be, for the one that ``step`` refuses."""
    actions_left, done, success = 0, True, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode: its state comes from ``options["state_seed"]`` (or ``seed``), what happens then from ``seed``.

        Raises:
            UserError: no state with these settings turned up.
        """
        super().reset(seed=seed)
        self.actions_left, self.done, self.success = self.max_actions, False, False
        return self._begin((options or {}).get("state_seed")), self._information()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act. ``action`` must be what ``parse_action`` returned.

        Raises:
            RuntimeError: the episode is over.
            ValueError: ``parse_action`` refuses the action.
        """
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        parsed = self.parse_action(action)
        if parsed is None:
            raise ValueError(f"action must be {self.allowed}, got {action!r}")
        self.actions_left -= 1
        observation, reward, terminated = self._act(parsed)
        truncated = not terminated and self.actions_left == 0
        self.done = terminated or truncated
        return observation, reward, terminated, truncated, self._information()

    @abstractmethod
    def parse_action(self, text: str) -> str | None:
        """The canonical form of an action that is allowed now, or None."""

    @abstractmethod
    def _begin(self, state_seed: int | None) -> str:
        """Draw an initial state, from the environment's own generator if there is no seed; returns the observation."""

    @abstractmethod
    def _act(self, action: str) -> tuple[str, float, bool]:
        """Observation, reward, and whether the episode has ended by the rules; ``success`` is set here as well."""

    def _information(self) -> dict[str, Any]:
        return {}


class Expert(ABC):
    """Describes a state in words that never hold the next action; some plan as well, in words that do."""

    def reason(self, environment: Any, words: int, draws: np.random.Generator) -> str:
        """Facts about the state in varied words and order, exactly ``words`` words."""
        return spoken(lambda: self._facts(environment, draws), words, draws)

    @abstractmethod
    def _facts(self, environment: Any, draws: np.random.Generator) -> list[str]:
        """At least one fact."""


def check_whole(**settings: tuple[int, int, int | None]) -> None:
    """Refuse, with a ValueError, a setting that is no whole number from the least to the most (None: any) beside it."""
    for name, (value, least, most) in settings.items():
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            allowed = f"from {least} on" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")


def check_flag(**settings: bool) -> None:
    """Refuse a setting that is neither true nor false, with a ValueError."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
