"""An environment that is being looked at, its expert, and ways to play it."""

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.environments.making import make
from pipeline.environments.playing import actions_left_of, parse_action, reset, step, transition
from pipeline.settings.params import Environment

Seen = dict[str, Any]
"""What an environment shows at one moment, by name."""


@dataclass(frozen=True)
class Bounds:
    """How far the suite looks, and what it tolerates."""

    states: int = 12
    """Initial states that each contract is checked on."""
    longest: int = 1000
    """Actions after which every episode must be over."""
    attempts: int = 20
    """Seeds of the noise within which the expert must solve an instance once."""
    solved: float = 1.0
    """Least share of solvable instances that the expert solves."""


BOUNDS = Bounds()


class Suite:
    """An environment's section, its expert, and ways to play it."""

    def __init__(self, section: Environment, expert: Any, bounds: Bounds) -> None:
        self.section, self.bounds, self.place = section, bounds, ""
        self.module = type(make(section)).__module__
        own = getattr(importlib.import_module(self.module), "expert", None)
        self.expert: Any = expert if expert is not None else own and own()
        self.draws = np.random.default_rng(0)
        self._texts: set[str] = set()
        self._pieces: dict[str, None] = {}

    def fresh(self) -> Any:
        """Another instance."""
        return make(self.section)

    def reset(self, environment: Any, seed: int, state_seed: int | None) -> str:
        """Start an episode as the pipeline does, and remember its seeds for the report."""
        self.place = f"(seed {seed})" if state_seed is None else f"(state_seed {state_seed}, seed {seed})"
        return reset(environment, seed, state_seed)

    def opening(self, environment: Any, seed: int, state_seed: int | None) -> Seen:
        """Start an episode, and see all that there is to see."""
        observation = self.reset(environment, seed, state_seed)
        return {
            "observation": observation,
            "instructions": environment.instructions,
            "state_key": environment.state_key,
            "actions_left": actions_left_of(environment),
        }

    def states(self) -> Iterator[tuple[int, int]]:
        """State seeds, each with a seed for the noise."""
        return ((state, 1000 + state) for state in range(self.bounds.states))

    def rounds(self) -> Iterator[tuple[Any, int, int]]:
        """An instance again and again, each time with a state seed and a seed for the noise."""
        environment = self.fresh()
        return ((environment, state, seed) for state, seed in self.states())

    def action(self, environment: Any, observation: str) -> Any:
        """An action that is allowed now: the expert's random ones, or else what the texts name."""
        random_action = getattr(self.expert, "random_action", None)
        if random_action is not None:
            return parse_action(environment, random_action(environment, self.draws))
        for text in (environment.instructions, observation):
            if text in self._texts:
                continue
            self._texts.add(text)
            self._pieces |= {piece: None for piece in _pieces(text) if parse_action(environment, piece) is not None}
        known = list(self._pieces)
        drawn = (parse_action(environment, known[index]) for index in self.draws.permutation(len(known)))
        return next((action for action in drawn if action is not None), None)

    def play(
        self, environment: Any, seed: int, state_seed: int, loop: int = 0
    ) -> Iterator[tuple[str, str, float, bool]]:
        """Actions and what followed: at random, or after a random beginning the same ``loop`` actions again and again."""
        observation = self.reset(environment, seed, state_seed)
        start, chosen = int(self.draws.integers(4)), list[str]()
        for number in range(self.bounds.longest):
            looping = loop > 0 and number >= start
            action = chosen[(number - start) % loop] if looping and len(chosen) == loop else None
            if action is None or parse_action(environment, action) != action:
                action = self.action(environment, observation)
            if action is None:
                return
            if looping and len(chosen) < loop:
                chosen.append(action)
            observation, reward, over = step(environment, action)
            yield action, observation, reward, over
            if over:
                return

    def actions(self, seed: int, state_seed: int) -> list[str]:
        """At most 30 actions of a random episode."""
        played = self.play(self.fresh(), seed, state_seed)
        return [action for (action, *_), _ in zip(played, range(30), strict=False)]

    def replay(
        self, environment: Any, seed: int, state_seed: int, actions: Sequence[str], reads: int = 1
    ) -> list[Seen]:
        """What actions show from the start of an episode on; see ``proceed``."""
        self.reset(environment, seed, state_seed)
        return proceed(environment, actions, reads)


def proceed(environment: Any, actions: Sequence[str], reads: int = 1) -> list[Seen]:
    """Step through actions up to the end; ``reads`` times a step everything is read, with 0 only the last state_key."""
    found: list[Seen] = []
    for number, action in enumerate(actions, start=1):
        observation, reward, terminated, truncated = transition(environment, action)
        found.append({"observation": observation, "reward": reward, "terminated": terminated, "truncated": truncated})
        last = terminated or truncated or number == len(actions)
        for _ in range(max(reads, int(last))):
            found[-1]["state_key"] = environment.state_key
        for _ in range(reads - 1):
            environment.instructions, environment.success, parse_action(environment, action)
        if last:
            break
    return found


def _pieces(text: str) -> Iterator[str]:
    """Whatever in a text might be an action: lines, parts between commas, up to four words in a row."""
    yield from (part.strip() for part in re.split(r"[\n,;:.]", text))
    words = re.findall(r"[^\s,;:.()\"'`]+", text)
    for length in range(1, 5):
        yield from (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))


def short(value: Any) -> str:
    """A value in at most 60 characters and an ellipsis."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def parting(one: Sequence[Seen], other: Sequence[Seen]) -> str | None:
    """Where two courses part, in what the first one holds."""
    for number, (left, right) in enumerate(zip(one, other, strict=False), start=1):
        for part in left:
            a, b = str(left[part]), str(right[part])
            if a != b:
                equal = (x == y for x, y in zip(a, b, strict=False))
                start = max(0, next((i for i, same in enumerate(equal) if not same), min(len(a), len(b))) - 20)
                return f"{part} {short(a[start:])} and {short(b[start:])}" + f" at step {number}" * (len(one) > 1)
    return None
