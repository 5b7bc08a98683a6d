"""An environment in which one of two letters is rewarded."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Letter(gymnasium.Env[str, str]):
    """One turn: say a letter. Reward 1 for ``rewarded``."""

    observation_space = gymnasium.spaces.Text(max_length=20)
    action_space = gymnasium.spaces.Text(max_length=1)
    instructions = "Say A or B."

    def __init__(self, rewarded: str = "A") -> None:
        self.rewarded, self.done, self.success = rewarded, True, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        state_seed = (options or {}).get("state_seed", seed)
        self.item, self.done, self.success = int(np.random.default_rng(state_seed).integers(1000)), False, False
        return f"item {self.item}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        self.done, self.success = True, action == self.rewarded
        return f"item {self.item}", float(self.success), True, False, {}

    def parse_action(self, text: str) -> str | None:
        return text if text in ("A", "B") else None

    @property
    def state_key(self) -> str:
        return f"item {self.item}"


class LetterExpert:
    """Says A or B, whichever; the policy that learns from it knows the format and nothing else."""

    def act(self, environment: Letter, draws: np.random.Generator) -> str:
        return "AB"[int(draws.integers(2))]

    def random_action(self, environment: Letter, draws: np.random.Generator) -> str:
        return "AB"[int(draws.integers(2))]

    def reason(self, environment: Letter, words: int, draws: np.random.Generator) -> str:
        return " ".join(["hm"] * words)


expert = LetterExpert
gymnasium.register(id="actfocus_test/Letter-v0", entry_point=Letter, disable_env_checker=True)
LETTER = {
    "id": "actfocus_test/Letter-v0",
    "max_turns": 1,
    "response_tokens": 12,
    "context_tokens": 64,
    "format_penalty": 0.0,
}
