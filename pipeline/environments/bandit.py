"""A bandit with two arms whose names are the only clue: one pays a little for sure, the other a lot now and then."""

import math

import gymnasium
import numpy as np

from pipeline.environments.draws import one_of, state_draws, wording
from pipeline.environments.episodic import Episodic, Expert

SAFE = (
    ("steady", "calm", "quiet", "patient", "modest", "sturdy", "gentle", "trusty", "sober", "careful"),
    ("anchor", "harbour", "pension", "turtle", "brick", "oak", "pillow", "cottage", "ledger", "blanket"),
)
"""Adjectives and nouns of the low arm's name."""

RISKY = (
    ("wild", "blazing", "reckless", "daring", "stormy", "roaring", "giddy", "fierce", "electric", "lucky"),
    ("comet", "dragon", "jackpot", "casino", "volcano", "rocket", "roulette", "phoenix", "lottery", "tiger"),
)
"""Adjectives and nouns of the high arm's name."""

POSITIONS = ("first arm", "second arm")
"""What ``parse_action`` takes for the arms' names, in the order in which they are shown."""


class Bandit(Episodic):
    """Choose one of two arms, once. Success is to choose the high arm, whether it pays or not.

    Args:
        low_reward: what the low arm always pays; below the high arm's mean.
        high_reward: what the high arm pays when it pays; else it pays 0.
        high_probability: chance that the high arm pays, above 0 and at most 1.

    Raises:
        ValueError: a setting outside these limits.
    """

    observation_space = gymnasium.spaces.Text(max_length=200)

    def __init__(self, low_reward: float = 0.1, high_reward: float = 1.0, high_probability: float = 0.25) -> None:
        if not 0.0 < high_probability <= 1.0:
            raise ValueError(f"high_probability must be in (0, 1], got {high_probability!r}")
        if not math.isfinite(high_reward):
            raise ValueError(f"high_reward must be finite, got {high_reward!r}")
        mean = high_probability * high_reward
        if not -math.inf < low_reward < mean:
            raise ValueError(f"low_reward must be below the high arm's mean {mean:g}, got {low_reward!r}")
        self.low_reward, self.high_reward, self.high_probability = low_reward, high_reward, high_probability
        self.arms: tuple[str, ...] = ()
        self.high, self.paid = "", 0.0

    def _begin(self, state_seed: int | None) -> str:
        draws = state_draws(self.np_random, state_seed, 1)
        low, self.high = (f"{one_of(adjectives, draws)} {one_of(nouns, draws)}" for adjectives, nouns in (SAFE, RISKY))
        self.arms = (low, self.high) if draws.integers(2) else (self.high, low)
        self.allowed, self.paid = " or ".join(map(repr, self.arms)), 0.0
        return f"arms: {', '.join(self.arms)}"

    def _act(self, arm: str) -> tuple[str, float, bool]:
        self.success = arm == self.high
        if self.success:
            self.paid = float(self.high_reward) if self.np_random.random() < self.high_probability else 0.0
        else:
            self.paid = float(self.low_reward)
        return f"arms: {', '.join(self.arms)}\n{arm} paid {self.paid:g}", self.paid, True

    def parse_action(self, text: str) -> str | None:
        """An arm's name as shown, for that in any case and spacing or for its place in ``POSITIONS``; else None."""
        name = " ".join(text.lower().split())
        if name in self.arms:
            return name
        return dict(zip(POSITIONS, self.arms, strict=False)).get(name)

    @property
    def state_key(self) -> str:
        """The arms in order, and what has been paid."""
        return f"{' / '.join(self.arms)}: {self.paid:g}"

    @property
    def instructions(self) -> str:
        """Task, arms, actions and limits; the names are in the observation."""
        return (
            f"You are playing a bandit with two arms. One always pays {self.low_reward:g}; the other pays "
            f"{self.high_reward:g} with probability {self.high_probability:g}, else 0. Their names hint at which is "
            "which. Choose the arm that pays more on average.\n"
            "Actions: the name of an arm, as shown. You have 1 action."
        )


class BanditExpert(Expert):
    """Chooses the high arm, and describes the arms in words that never name one; a plan does."""

    def act(self, bandit: Bandit, draws: np.random.Generator) -> str:
        """The high arm's name; nothing is left to ``draws``."""
        return bandit.high

    def random_action(self, bandit: Bandit, draws: np.random.Generator) -> str:
        """Either arm."""
        return one_of(bandit.arms, draws)

    def plan(self, bandit: Bandit, action: str, draws: np.random.Generator) -> str:
        """Which arm to take for the high one."""
        return f"the bold one is {action}"

    def _facts(self, bandit: Bandit, draws: np.random.Generator) -> list[str]:
        pick = wording(draws)
        sides = ("left", "right") if bandit.arms[1] == bandit.high else ("right", "left")
        mean = bandit.high_probability * bandit.high_reward
        return [
            f"the {sides[0]} one {pick('sounds', 'seems', 'looks')} {pick('safe', 'certain', 'tame')}",
            f"the {sides[1]} one {pick('sounds', 'seems', 'looks')} {pick('risky', 'bold', 'uncertain')}",
            f"{pick('sure pay', 'for certain', 'without luck')} {bandit.low_reward:g}",
            f"{pick('with luck', 'now and then', 'at best')} {bandit.high_reward:g}",
            f"{pick('on average', 'mean of the bold one', 'its mean is')} {mean:g}",
            pick("let me think", "hmm", "what do names tell", "so", "luck matters once"),
        ]


expert = BanditExpert
