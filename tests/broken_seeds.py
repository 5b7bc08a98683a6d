"""Walks that break a contract of what seeds decide."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np

from tests.walks import Walk, breaks


@breaks("same seed")
class DrawsFromNowhere(Walk):
    def draw_state(self, seed: int) -> None:
        super().draw_state(int(np.random.default_rng().integers(1000)))


@breaks("same seed")
class KeyNamesTheInstance(Walk):
    @property
    def state_key(self) -> str:
        return f"{id(self)} {super().state_key}"


@breaks("another process")
class HashesItsSeed(Walk):
    def draw_state(self, seed: int) -> None:
        super().draw_state(hash(str(seed)) % 2**31)


@breaks("another process")
class HashesItsActions(Walk):
    def slips(self) -> bool:
        return hash(f"{self.cell[0]} {self.goal} {self.actions_left}") % 2 == 0


@breaks("seed used")
class IgnoresItsSeeds(Walk):
    def draw_state(self, seed: int) -> None:
        super().draw_state(0)


@breaks("seed used")
class KeyIsAlwaysTheSame(Walk):
    """All states would fall into one split."""

    state_key: Any = "somewhere"


@breaks("state_key")
class KeyForgetsTheCell(Walk):
    @property
    def state_key(self) -> str:
        return f"goal {self.goal}"


@breaks("group")
class WordsItsPromptByTheNoise(Walk):
    def reset(self, **given: Any) -> Any:
        super().reset(**given)
        self.instructions = ("Go. ", "Please go. ")[int(self.np_random.integers(2))] + Walk.instructions
        return self.observe(), {}


@breaks("group")
class StartsByTheNoise(Walk):
    """Like 11 distinct prompts inside one group of a Bandit."""

    def reset(self, **given: Any) -> Any:
        super().reset(**given)
        self.cell = [int(self.np_random.choice([cell for cell in range(9) if cell != self.goal]))]
        return self.observe(), {}


@breaks("group")
class LimitsByTheNoise(Walk):
    """The published layout states in the prompt how many actions are left."""

    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.actions_left = int(self.np_random.integers(8, 13))
        return started


@breaks("replay")
class SlipsByAGeneratorOfItsOwn(Walk):
    noise = np.random.default_rng(0)

    def slips(self) -> bool:
        return bool(self.noise.random() < 0.5)


class Slippery(Walk):
    """Draws whether a foot slips from a generator of its own."""

    def slips(self) -> bool:
        return bool(self.luck().random() < 0.3)

    def luck(self) -> Any:
        raise NotImplementedError


@breaks("noise")
class SlipsByItsState(Slippery):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.held = {"luck": [np.random.default_rng(self.cell)]}
        return started

    def luck(self) -> Any:
        return self.held["luck"][0]


@breaks("noise")
class SlipsByAConstant(Slippery):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.np_random = np.random.default_rng(5)
        return started

    def luck(self) -> Any:
        return self.np_random


@breaks("noise")
class SlipsByTheGlobalGeneratorOfNumPy(Slippery):
    def reset(self, **given: Any) -> Any:
        np.random.seed(0)
        return super().reset(**given)

    def luck(self) -> Any:
        return np.random


@breaks("noise")
class SlipsByTheGlobalGeneratorOfPython(Slippery):
    def reset(self, **given: Any) -> Any:
        random.seed("luck")
        return super().reset(**given)

    def luck(self) -> Any:
        return random


@breaks("noise")
class SlipsByTheNumberOfTheAction(Slippery):
    """No generator lasts longer than a step."""

    def luck(self) -> Any:
        return np.random.default_rng([3, self.actions_left])


@breaks("noise")
class PaysByItsState(Walk):
    """One action, as in a Bandit: nothing is ever met twice."""

    limit = 1

    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.luck = np.random.RandomState(self.goal)
        return started

    def slips(self) -> bool:
        return False

    def reward(self, action: str) -> float:
        return float(self.luck.random_sample() < 0.5)


@breaks("reading")
class KeyCountsItsReads(Walk):
    reads = 0

    def reset(self, **given: Any) -> Any:
        self.reads = 0
        return super().reset(**given)

    @property
    def state_key(self) -> str:
        self.reads += 1
        return f"{super().state_key} {self.reads}"


@breaks("reading")
class ParsingDraws(Walk):
    def parse_action(self, text: str) -> str | None:
        if hasattr(self, "actions_left"):
            self.np_random.random()
        return super().parse_action(text)


@breaks("copies")
class CopiesShareTheCell(Walk):
    def __deepcopy__(self, memo: Any) -> Any:
        twin = copy.copy(self)
        twin.np_random = copy.deepcopy(self.np_random)
        return twin


@breaks("copies")
class CopiesForgetTheNoise(Walk):
    def __deepcopy__(self, memo: Any) -> Any:
        twin = copy.copy(self)
        twin.cell, twin.np_random = list(self.cell), np.random.default_rng(5)
        return twin


@breaks("copies")
class KeyIsLostInACopy(Walk):
    label = ""

    def reset(self, **given: Any) -> Any:
        self.label = "original"
        return super().reset(**given)

    def __deepcopy__(self, memo: Any) -> Any:
        twin = copy.copy(self)
        twin.cell, twin.label, twin.np_random = list(self.cell), "copy", copy.deepcopy(self.np_random)
        return twin

    @property
    def state_key(self) -> str:
        return f"{super().state_key} {self.label}"
