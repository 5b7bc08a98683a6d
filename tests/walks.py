"""An environment that keeps every contract, and what its variants are told by."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from pipeline.settings.params import Environment


class Walk(gymnasium.Env[str, str]):
    """Walk along nine cells to the goal; now and then a foot slips. It keeps every contract."""

    observation_space = gymnasium.spaces.Text(max_length=60)
    action_space = gymnasium.spaces.Text(max_length=10)
    instructions = "Walk to the goal. Actions: left, right."
    limit = 12

    def __init__(self) -> None:
        self.done, self.success, self.cell, self.goal = True, False, [0], 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.draw_state((options or {}).get("state_seed", seed))
        self.actions_left, self.done, self.success = self.limit, False, False
        return self.observe(), {}

    def draw_state(self, seed: int) -> None:
        start, self.goal = map(int, np.random.default_rng(seed).permutation(9)[:2])
        self.cell = [start]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        if not self.slips():
            self.cell[0] = min(8, max(0, self.cell[0] + (1 if action == "right" else -1)))
        self.actions_left -= 1
        self.success = self.cell[0] == self.goal
        self.done = self.success or self.actions_left <= 0
        return self.observe(), self.reward(action), self.success, self.done and not self.success, {}

    def slips(self) -> bool:
        return bool(self.np_random.random() < 0.2)

    def reward(self, action: str) -> float:
        return float(self.success)

    def observe(self) -> str:
        return f"cell {self.cell[0]} goal {self.goal}"

    @property
    def state_key(self) -> str:
        return f"{self.cell[0]} {self.goal}"

    def parse_action(self, text: str) -> str | None:
        action = text.strip().lower()
        return action if action in ("left", "right") else None


class WalkExpert:
    """Walks towards the goal."""

    def act(self, walk: Walk, draws: np.random.Generator) -> str:
        return "right" if walk.goal > walk.cell[0] else "left"

    def random_action(self, walk: Walk, draws: np.random.Generator) -> str:
        return ("left", "right")[int(draws.integers(2))]

    def reason(self, walk: Walk, words: int, draws: np.random.Generator) -> str:
        return " ".join(["hm"] * words)


BROKEN: dict[type[Walk], str] = {}
"""What breaks a contract, and which."""


def breaks(contract: str) -> Any:
    def register(broken: type[Walk]) -> type[Walk]:
        BROKEN[broken] = contract
        return registered(broken)

    return register


def registered(kind: type[Walk]) -> type[Walk]:
    gymnasium.register(id=f"{kind.__name__}-v0", entry_point=kind, disable_env_checker=True)
    return kind


def section(kind: type[Walk], **settings: Any) -> Environment:
    """A walk's section of ``params.yaml``."""
    return Environment(id=f"{kind.__module__}:{kind.__name__}-v0", settings=settings)


registered(Walk)
