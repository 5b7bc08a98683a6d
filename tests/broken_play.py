"""Walks that break a contract of what an environment takes and returns, or of how an episode goes."""

from __future__ import annotations

from typing import Any

import gymnasium

from tests.walks import Walk, breaks


@breaks("made")
class RefusesToBeMade(Walk):
    def __init__(self) -> None:
        raise ValueError("no")


@breaks("form")
class ResetReturnsTextAlone(Walk):
    def reset(self, **given: Any) -> Any:
        return super().reset(**given)[0]


@breaks("form")
class AnotherKindOfSpace(Walk):
    observation_space: Any = gymnasium.spaces.Discrete(9)


@breaks("form")
class SucceedsBeforeItStarts(Walk):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.success = True
        return started


@breaks("actions")
class AllowsNothing(Walk):
    def parse_action(self, text: str) -> str | None:
        return None


@breaks("actions")
class AllowsWhatSeparatesActions(Walk):
    def parse_action(self, text: str) -> str | None:
        return "left||right" if text.strip() else None


@breaks("step")
class FourResults(Walk):
    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated or truncated, {}


@breaks("step")
class RewardsAreNotFinite(Walk):
    def reward(self, action: str) -> float:
        return float("nan")


@breaks("step")
class RewardsAreText(Walk):
    def reward(self, action: str) -> Any:
        return str(float(self.success))


@breaks("step")
class FlagsAreNumbers(Walk):
    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, information = super().step(action)
        return observation, reward, int(terminated), truncated, information


@breaks("step")
class InformationIsMissing(Walk):
    def step(self, action: str) -> Any:
        return *super().step(action)[:4], None


@breaks("step")
class SuccessIsANumber(Walk):
    def step(self, action: str) -> Any:
        stepped = super().step(action)
        self.success: Any = int(self.success)
        return stepped


@breaks("form")
class KnowsNoLargeSeeds(Walk):
    """Like an index into a list of levels."""

    def draw_state(self, seed: int) -> None:
        super().draw_state(range(10**6)[seed])


@breaks("texts")
class ObservationsOutgrowTheirSpace(Walk):
    def observe(self) -> str:
        return super().observe() + "!" * 60 * (self.actions_left < 9 if hasattr(self, "actions_left") else 0)


@breaks("texts")
class SaysNothingAfterTheStart(Walk):
    def step(self, action: str) -> Any:
        return "", *super().step(action)[1:]


@breaks("redoing")
class PaysForEveryStepToTheRight(Walk):
    def reward(self, action: str) -> float:
        return 1.0 if action == "right" else -0.5


@breaks("redoing")
class PaysForTheSameAgain(Walk):
    """Like 20 overwrites of one Sudoku cell."""

    def reward(self, action: str) -> float:
        return 0.5 * (self.cell[0] in (0, 8)) + float(self.success)


@breaks("ends")
class NeverEnds(Walk):
    def step(self, action: str) -> Any:
        observation, reward, terminated, _, information = super().step(action)
        self.actions_left, self.done = self.limit, terminated
        return observation, reward, terminated, False, information


@breaks("form")
class CountsInHalves(Walk):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.actions_left: Any = 11.5
        return started


@breaks("outcome")
class EndsAsIfItHadBeenCutOff(Walk):
    outcome = "turns"


@breaks("outcome")
class EndsInANumber(Walk):
    @property
    def outcome(self) -> Any:
        return "goal" if self.success else 0


@breaks("actions_left")
class MiscountsItsActions(Walk):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.taken, self.actions_left = 0, 6
        return started

    def step(self, action: str) -> Any:
        self.taken += 1
        self.actions_left = 12 - self.taken + 1
        stepped = super().step(action)
        self.actions_left = max(0, min(6, self.actions_left))
        return stepped


@breaks("after the end")
class GoesOnAfterTheEnd(Walk):
    def step(self, action: str) -> Any:
        self.done = False
        if not hasattr(self, "actions_left"):
            raise RuntimeError("call reset")
        return super().step(action)


@breaks("after the end")
class StartsWithoutAReset(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.done, self.actions_left = False, 12


@breaks("parsing")
class AllowsAnything(Walk):
    def parse_action(self, text: str) -> str | None:
        return "right" if "right" in text else "left"


@breaks("parsing")
class DoesNotParseItsOwnActions(Walk):
    def parse_action(self, text: str) -> str | None:
        return {"left": "go left", "right": "go right"}.get(text.strip())
