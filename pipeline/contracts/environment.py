"""The contracts that every environment keeps, ours and a user's own, and a suite that looks for broken ones.

    python -m pipeline.contracts.environment --params params.yaml
    python -m pipeline.contracts.environment --id lamps:Lamps-v0 --settings '{"faulty": 0.1}'

``CONTRACTS`` says what is checked, in order. docs/environments.md says why.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import gymnasium
import numpy as np

from pipeline.environments.making import make
from pipeline.environments.playing import (
    actions_left_of,
    board_of,
    outcome_of,
    parse_action,
    reset,
    success_of,
    text_of,
    transition,
)
from pipeline.settings.params import Environment, load
from pipeline.workspace.errors import UserError

PLOTTING = ("matplotlib", "pygame", "plotly", "seaborn", "bokeh")
REFUSED = ("", " ", "\n", "||", "<think>", "</answer>", "\x00\x01")
"""Never an action: nothing, the separator of actions, the tags of a response, control characters."""

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


def check_environment(environment: Environment, expert: Any = None, bounds: Bounds = BOUNDS) -> list[str]:
    """Look for broken contracts.

    Args:
        environment: id and settings, as under ``environments`` in params.yaml.
        expert: plays the environment; without one, ``expert()`` of the environment's module if it is there.
        bounds: how far to look.

    Returns:
        A line per broken contract: its name, what was seen, the seeds. A contract that needs a broken one is left out.
    """
    try:
        suite = _Suite(environment, expert, bounds)
    except UserError as error:
        return [f"made: {error}"]
    lines, failed = list[str](), set[str]()
    for name, (contract, needs) in CONTRACTS.items():
        if failed.intersection(needs):
            failed.add(name)
            continue
        suite.place = ""
        try:
            seen = next(contract(suite), None)
        except UserError as error:  # the pipeline's own words
            seen = str(error).removeprefix("environments: ")
        except Exception as error:
            seen = f"raised {type(error).__name__}: {error}"
        if seen is not None:
            failed.add(name)
            lines.append(" ".join(f"{name}: {seen} {suite.place}".split()))
    return lines


class _Suite:
    """An environment's section, its expert, and ways to play it."""

    def __init__(self, section: Environment, expert: Any, bounds: Bounds) -> None:
        self.section, self.bounds, self.place = section, bounds, ""
        self.module = type(make(section)).__module__
        own = getattr(importlib.import_module(self.module), "expert", None)
        self.expert: Any = expert if expert is not None else own and own()
        self.draws = np.random.default_rng(0)
        self._texts: set[str] = set()
        self._pieces: dict[str, None] = {}
        self._child: Seen | None = None

    def fresh(self) -> Any:
        return make(self.section)

    def reset(self, environment: Any, seed: int, state_seed: int | None) -> str:
        """Start an episode as the pipeline does, and remember its seeds for the report."""
        self.place = f"(seed {seed})" if state_seed is None else f"(state_seed {state_seed}, seed {seed})"
        return reset(environment, seed, state_seed)

    def opening(self, environment: Any, seed: int, state_seed: int | None) -> Seen:
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
    ) -> Iterator[tuple[str, str, float, bool, bool]]:
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
            observation, reward, terminated, truncated = transition(environment, action)
            yield action, observation, reward, terminated, truncated
            if terminated or truncated:
                return

    def actions(self, seed: int, state_seed: int) -> list[str]:
        """At most 30 actions of a random episode."""
        played = self.play(self.fresh(), seed, state_seed)
        return [action for (action, *_), _ in zip(played, range(30), strict=False)]

    def replay(
        self, environment: Any, seed: int, state_seed: int, actions: Sequence[str], reads: int = 1
    ) -> list[Seen]:
        self.reset(environment, seed, state_seed)
        return proceed(environment, actions, reads)

    def elsewhere(self) -> Seen:
        """What another process under another PYTHONHASHSEED sees."""
        if self._child is None:
            played = [[seed, state, self.actions(seed, state)] for state, seed in self.states()]
            asked = {"module": self.module, "section": self.section.model_dump(), "episodes": played}
            program = "from pipeline.contracts import environment; environment._answer()"
            changed = {
                "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            }
            done = subprocess.run(
                [sys.executable, "-c", program],
                input=json.dumps(asked),
                env=os.environ | changed,
                capture_output=True,
                text=True,
                timeout=600,
            )
            if done.returncode:
                self._child = {"error": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]}
            else:
                self._child = json.loads(done.stdout.splitlines()[-1]) | {"asked": played}
        return self._child


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


def _misfit(name: str, text: str, space: Any) -> Iterator[str]:
    """Length alone: gymnasium's default characters are letters and digits, without even a space."""
    if not space.min_length <= len(text) <= space.max_length:
        yield f"{name} of {len(text)} characters, its space has {space.min_length} to {space.max_length}"


def _accepts(environment: Any, action: str) -> bool:
    try:
        environment.step(action)
    except Exception:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _difference(one: Sequence[Seen], other: Sequence[Seen]) -> str | None:
    """Where two courses part, in what the first one holds."""
    for number, (left, right) in enumerate(zip(one, other, strict=False), start=1):
        for part in left:
            a, b = str(left[part]), str(right[part])
            if a != b:
                equal = (x == y for x, y in zip(a, b, strict=False))
                start = max(0, next((i for i, same in enumerate(equal) if not same), min(len(a), len(b))) - 20)
                return f"{part} {_short(a[start:])} and {_short(b[start:])}" + f" at step {number}" * (len(one) > 1)
    return None


def _answer() -> None:
    """In the other process: replay what standard input asks for, and print what was seen."""
    asked = json.load(sys.stdin)
    if asked["module"] != "__main__":
        importlib.import_module(asked["module"])
    suite = _Suite(Environment(**asked["section"]), None, Bounds())
    environment, seen = suite.fresh(), []
    for seed, state, actions in asked["episodes"]:
        openings = [suite.opening(environment, seed, None), suite.opening(environment, seed, state)]
        seen.append([openings, proceed(environment, actions)])
    print(f"\n{json.dumps({'seen': seen, 'modules': [name for name in PLOTTING if name in sys.modules]})}")


# ------------------------------------------------------------------------------------------------------- the contracts


def form(suite: _Suite) -> Iterator[str]:
    """Spaces are ``Text``, ``reset`` returns (str, dict) whatever integer the seeds are, the attributes have their types."""
    environment = suite.fresh()
    for space in ("observation_space", "action_space"):
        if not isinstance(getattr(environment, space, None), gymnasium.spaces.Text):
            yield f"{space} is not a gymnasium.spaces.Text"
    for state, seed in (*suite.states(), (2**31 - 1, 2**31 - 1)):
        suite.reset(environment, seed, state)
        _read(environment)
        if success_of(environment):
            yield "success is True before the first action"


def _read(environment: Any) -> None:
    """Read every attribute as the pipeline does, which refuses what it must not be."""
    text_of(environment, "instructions")
    text_of(environment, "state_key")
    success_of(environment)
    actions_left_of(environment)


def actions(suite: _Suite) -> Iterator[str]:
    """After every reset an allowed action is found: the expert's, or one that the texts name."""
    environment = suite.fresh()
    for state, seed in suite.states():
        observation = suite.reset(environment, seed, state)
        if suite.action(environment, observation) is None:
            yield "parse_action allows nothing that the expert does or, without one, that the texts name"


def step(suite: _Suite) -> Iterator[str]:
    """``step`` returns (str, finite number, flag, flag, dict) as the pipeline takes them; the attributes keep their types."""
    environment = suite.fresh()
    for state, seed in suite.states():
        for _ in zip(suite.play(environment, seed, state), range(30), strict=False):
            _read(environment)
    yield from ()


def texts(suite: _Suite) -> Iterator[str]:
    """Observations and instructions are not empty; observations and actions are as long as their spaces say."""
    environment = suite.fresh()
    for state, seed in suite.states():
        opening = suite.opening(environment, seed, state)
        for name in ("observation", "instructions", "state_key"):
            if not opening[name].strip():
                yield f"{name} is empty"
        yield from _misfit("observation", opening["observation"], environment.observation_space)
        for action, observation, *_ in suite.play(environment, seed, state):
            if not observation.strip():
                yield f"the observation after {action!r} is empty"
            yield from _misfit("action", action, environment.action_space)
            yield from _misfit("observation", observation, environment.observation_space)


def same_seed(suite: _Suite) -> Iterator[str]:
    """Equal seeds give an equal opening: in one instance, played or not, and in two."""
    one, other = suite.fresh(), suite.fresh()
    for state, seed in suite.states():
        for _ in suite.play(one, seed, state):
            pass
        for given in (None, state):
            first = suite.opening(one, seed, given)
            for again in (one, other):
                difference = _difference([first], [suite.opening(again, seed, given)])
                if difference:
                    yield f"{'two instances' if again is other else 'two resets'} differ: {difference}"


def another_process(suite: _Suite) -> Iterator[str]:
    """Equal seeds and actions give equal episodes in another process under another PYTHONHASHSEED."""
    child, environment = suite.elsewhere(), suite.fresh()
    if "error" in child:
        yield f"nothing came back (is the environment registered on import of {suite.module}?): {child['error']}"
    for (seed, state, played), (openings, course) in zip(child["asked"], child["seen"], strict=True):
        here = [suite.opening(environment, seed, None), suite.opening(environment, seed, state)]
        difference = _difference(here, openings) or _difference(proceed(environment, played), course)
        if difference:
            yield f"differs there: {difference}"


def seed_used(suite: _Suite) -> Iterator[str]:
    """Among several seeds two differ, in what is shown and in state_key, whether given as seed or as state_seed."""
    environment = suite.fresh()
    ways = {
        "seed": [suite.opening(environment, seed, None) for _, seed in suite.states()],
        "state_seed": [suite.opening(environment, 0, state) for state, _ in suite.states()],
    }
    suite.place = ""
    for way, openings in ways.items():
        if len({opening["state_key"] for opening in openings}) == 1:
            yield f"{len(openings)} values of {way} have one state_key, {_short(openings[0]['state_key'])}"
        if len({(opening["observation"], opening["instructions"]) for opening in openings}) == 1:
            yield f"{len(openings)} values of {way} show one opening, {_short(openings[0]['observation'])}"


def state_key(suite: _Suite) -> Iterator[str]:
    """Initial states with one state_key show one opening: splits and groups go by the key."""
    environment, met = suite.fresh(), dict[str, tuple[Seen, int]]()
    for state in range(10 * suite.bounds.states):
        opening = suite.opening(environment, 0, state)
        first, place = met.setdefault(opening["state_key"], (opening, state))
        difference = _difference([first], [opening])
        if difference:
            yield f"state_key {_short(opening['state_key'])} also belongs to state_seed {place}, but {difference}"


def group(suite: _Suite) -> Iterator[str]:
    """Members of a group, equal in state_seed and not in seed, share observation, instructions and state_key."""
    environment = suite.fresh()
    for state, seed in suite.states():
        first = suite.opening(environment, seed, state)
        for member in (0, 1, 2**31 - 1):
            difference = _difference([first], [suite.opening(environment, member, state)])
            if difference:
                yield f"differs from the member with seed {seed}: {difference}"


def replay(suite: _Suite) -> Iterator[str]:
    """Equal seeds and actions give equal episodes, in one instance and in two."""
    one, other = suite.fresh(), suite.fresh()
    for state, seed in suite.states():
        played = suite.actions(seed, state)
        first = suite.replay(one, seed, state, played)
        for again in (one, other):
            difference = _difference(first, suite.replay(again, seed, state, played))
            if difference:
                yield f"the same actions again: {difference}"


def reading(suite: _Suite) -> Iterator[str]:
    """Reading state_key, instructions and success, and parsing, change nothing."""
    environment = suite.fresh()
    for state, seed in suite.states():
        suite.reset(environment, seed, state)
        keys = [environment.state_key for _ in range(3)]
        if len(set(keys)) > 1:
            yield f"state_key changes when read: {_short(keys)}"
        played = suite.actions(seed, state)
        quiet = suite.replay(environment, seed, state, played, reads=0)
        difference = _difference(quiet, suite.replay(environment, seed, state, played, reads=3))
        if difference:
            yield f"goes on differently after reading: {difference}"


def copies(suite: _Suite) -> Iterator[str]:
    """A deep copy in mid-episode goes on as the original does, and neither disturbs the other."""
    environment = suite.fresh()
    for state, seed in suite.states():
        played = suite.actions(seed, state)
        for cut in {0, len(played) // 2}:
            whole = suite.replay(environment, seed, state, played)[cut:]
            suite.replay(environment, seed, state, played[:cut])
            twin = copy.deepcopy(environment)
            if twin.state_key != environment.state_key:
                yield f"state_key {_short(environment.state_key)} of the original, {_short(twin.state_key)} of the copy"
            for name, continued in (("copy", twin), ("original", environment)):
                difference = _difference(whole, proceed(continued, played[cut:]))
                if difference:
                    yield f"copied after {cut} actions, the {name} goes on differently: {difference}"


def redoing(suite: _Suite) -> Iterator[str]:
    """From a state_key back to the same state_key, the episode going on, the rewards sum to at most 0."""
    environment = suite.fresh()
    for state, seed in suite.states():
        for loop in (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3):
            key = suite.opening(environment, seed, state)["state_key"]
            earned, done, least = 0.0, list[str](), {key: (0.0, 0)}
            for action, _, reward, terminated, truncated in suite.play(environment, seed, state, loop):
                earned += reward
                done.append(action)
                if terminated or truncated:
                    break
                key = environment.state_key
                before, since = least.get(key, (math.inf, 0))
                if earned > before + 1e-9:
                    way = " ".join(map(repr, done[since:][:4]))
                    yield f"back in state_key {_short(key)} by way of {way}, {earned - before:g} richer"
                if earned < before:
                    least[key] = (earned, len(done))


def ends(suite: _Suite) -> Iterator[str]:
    """Random play, and one allowed action again and again, end by themselves."""
    environment = suite.fresh()
    for state, seed in suite.states():
        for loop in (0, 1, 1, 2):
            course = list(suite.play(environment, seed, state, loop))
            if len(course) == suite.bounds.longest:
                *_, terminated, truncated = course[-1]
                if not (terminated or truncated):
                    yield f"not over after {len(course)} actions, the last ones {course[-2][0]!r} {course[-1][0]!r}"


def actions_left(suite: _Suite) -> Iterator[str]:
    """``actions_left``, if there is one, is what the prompt states: it never rises, and no episode outlasts it."""
    environment = suite.fresh()
    for state, seed in suite.states():
        suite.reset(environment, seed, state)
        left = allowed = actions_left_of(environment)
        if allowed is None:
            return
        if allowed < 1:
            yield f"actions_left is {allowed} before the first action"
        for number, _ in enumerate(suite.play(environment, seed, state), start=1):
            if number > allowed:
                yield f"{allowed} actions were left at the start, and the episode took {number}"
            now = actions_left_of(environment)
            if now is None or left is None or now > left:
                yield f"actions_left went from {left} to {now}"
            left = now


def outcome(suite: _Suite) -> Iterator[str]:
    """``outcome``, if there is one, is text where an episode has ended, and none of the words for being cut off."""
    environment = suite.fresh()
    for state, seed in suite.states():
        for _, _, _, terminated, truncated in suite.play(environment, seed, state):
            if terminated or truncated:
                outcome_of(environment)
    yield from ()


def board(suite: _Suite) -> Iterator[str]:
    """``board``, if the module has it, draws every state that a turn may begin in: the report calls it after training."""
    environment = suite.fresh()
    for state, seed in suite.states():
        board_of(environment, suite.opening(environment, seed, state)["state_key"])
        for _, _, _, terminated, truncated in suite.play(environment, seed, state):
            if not (terminated or truncated):
                board_of(environment, environment.state_key)
    yield from ()


def noise(suite: _Suite) -> Iterator[str]:
    """Where something is random, members of a group that differ in seed do not all meet the same.

    That something is random shows in two ways: a step draws from a generator that the environment holds (or Python's or
    NumPy's own), or the same action in one ``state_key`` of one episode leads to different keys. Then one seed at least
    must give other draws or another course than the others somewhere.
    """
    environment, blamed = suite.fresh(), ""
    for state, seed in suite.states():
        followed, before = dict[tuple[str, str], str](), list[list[str]]()
        for _ in range(PLAYS):
            played = suite.actions(seed, state)
            before.append(played)
            course, drawn = _rolled(suite, environment, seed, state, played)
            found = f"step({played[drawn[0][0]]!r}) draws at random" if drawn else _forks(course, played, followed)
            if not found:
                continue
            for actions, member in itertools.product(before, (0, 1, 2, 2**31 - 1)):
                mine = _rolled(suite, environment, seed, state, actions)
                if mine != _rolled(suite, environment, member, state, actions):
                    return
            blamed = blamed or f"{found}, and whatever the seed, the same happens {suite.place}"
            break
    suite.place = ""
    if blamed:
        yield blamed


PLAYS = 3
"""Random episodes of each initial state in which ``noise`` looks for something random."""


def _rolled(
    suite: _Suite, environment: Any, seed: int, state: int, actions: Sequence[str]
) -> tuple[list[Seen], list[tuple[int, bytes]]]:
    """A course, its opening first, and which of its steps drew from what state of a generator."""
    course, drawn = [suite.opening(environment, seed, state)], list[tuple[int, bytes]]()
    generators = _generators(environment)
    for number, action in enumerate(actions):
        before = [pickle.dumps(one()) for one in generators]
        course += proceed(environment, [action])
        drawn += [(number, was) for was, one in zip(before, generators, strict=True) if was != pickle.dumps(one())]
        if course[-1]["terminated"] or course[-1]["truncated"]:
            break
    return course, drawn


def _generators(environment: Any) -> list[Callable[[], Any]]:
    """What gives the state of each generator of NumPy or Python that can be reached from the environment, or is global."""
    found: list[Callable[[], Any]] = [random.getstate, np.random.get_state]
    waiting = deque([environment, *map(vars, type(environment).__mro__)])
    seen = set[int]()
    while waiting and len(seen) < REACHED:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, np.random.Generator):
            found.append(lambda bits=value.bit_generator: bits.state)  # type: ignore[misc]
        elif isinstance(value, np.random.RandomState):
            found.append(value.get_state)
        elif isinstance(value, random.Random):
            found.append(value.getstate)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            waiting.extend(value)
        else:
            waiting.append(getattr(value, "__dict__", None))
    return found


REACHED = 20_000
"""Objects that are looked at for generators; those nearest to the environment come first."""
_OPAQUE = (type(None), str, bytes, int, float, type, ModuleType, FunctionType, np.ndarray)
"""What holds no generator, or other environments' too."""


def _forks(course: Sequence[Seen], actions: Sequence[str], followed: dict[tuple[str, str], str]) -> str:
    """Where an action in a state leads elsewhere than it did before; what it leads to is added to ``followed``."""
    for (start, after), action in zip(itertools.pairwise(course), actions, strict=False):
        if after["terminated"] or after["truncated"]:
            break  # that the actions have run out may be seen in the key of an end
        key, arrived = start["state_key"], after["state_key"]
        known = followed.setdefault((key, action), arrived)
        if known != arrived:
            return f"step({action!r}) in state_key {_short(key)} leads to {_short(known)} and to {_short(arrived)}"
    return ""


def after_the_end(suite: _Suite) -> Iterator[str]:
    """``step`` raises before the first reset and after the end."""
    environment = suite.fresh()
    for state, seed in suite.states():
        for action, _, _, terminated, truncated in suite.play(environment, seed, state):
            if terminated or truncated:
                if _accepts(environment, action):
                    yield f"step({action!r}) is accepted after the end"
                if _accepts(suite.fresh(), action):
                    yield f"step({action!r}) is accepted before the first reset"


def parsing(suite: _Suite) -> Iterator[str]:
    """``parse_action`` leaves its own results as they are, and refuses what is no action."""
    environment = suite.fresh()
    for state, seed in suite.states():
        observation = suite.reset(environment, seed, state)
        for text in (*REFUSED, "x" * (environment.action_space.max_length + 1)):
            if parse_action(environment, text) is not None:
                yield f"{_short(text)} is an allowed action"
        for _ in range(10):
            action = suite.action(environment, observation) or ""
            for text in (action, action.upper(), action.lower(), f" {action}\n"):
                parsed = action if text == action else parse_action(environment, text)
                if parsed is None:
                    continue
                again = parse_action(environment, parsed)
                if again != parsed:
                    yield f"the allowed action {parsed!r} parses as {again!r}"


def expert(suite: _Suite) -> Iterator[str]:
    """The expert solves what it calls solvable, within some attempts; what it says is what ``step`` takes."""
    if suite.expert is None:
        return
    environment, player, unsolved, asked = suite.fresh(), suite.expert, list[int](), 0
    solvable = getattr(player, "solvable", lambda environment: True)
    for state, seed in suite.states():
        suite.reset(environment, seed, state)
        before = environment.state_key
        if not isinstance(player.reason(environment, 5, suite.draws), str):
            yield "reason does not return text"
        is_solvable = solvable(environment)
        player.act(environment, suite.draws)
        player.random_action(environment, suite.draws)
        if environment.state_key != before:
            yield "the expert changes the state by looking at it"
        if not is_solvable:
            continue
        asked += 1
        for attempt in range(suite.bounds.attempts):
            suite.reset(environment, seed + attempt, state)
            for _ in range(suite.bounds.longest):
                for name in ("random_action", "act"):
                    action = getattr(player, name)(environment, suite.draws)
                    if parse_action(environment, action) != action:
                        yield f"{name} gives {action!r}, which is not allowed or not its canonical form"
                _, _, terminated, truncated = transition(environment, action)
                if terminated or truncated:
                    break
            if environment.success:
                break
        else:
            unsolved.append(state)
    suite.place = f"(state_seed {', '.join(map(str, unsolved))})"
    if asked - len(unsolved) < suite.bounds.solved * asked:
        share, attempts = suite.bounds.solved, suite.bounds.attempts
        yield f"solves {asked - len(unsolved)} of {asked} instances in {attempts} attempts, less than {share:.0%}; not"


def imports(suite: _Suite) -> Iterator[str]:
    """Making and playing the environment imports no plotting library."""
    loaded = suite.elsewhere().get("modules")
    suite.place = ""
    if loaded:
        yield f"importing {suite.module} imports {', '.join(loaded)}"


_BASE = ("form", "actions", "step")
CONTRACTS: dict[str, tuple[Callable[[_Suite], Iterator[str]], tuple[str, ...]]] = {
    "form": (form, ()),
    "actions": (actions, ("form",)),
    "step": (step, ("form", "actions")),
    "texts": (texts, _BASE),
    "same seed": (same_seed, _BASE),
    "seed used": (seed_used, ("same seed",)),
    "state_key": (state_key, ("seed used",)),
    "group": (group, ("same seed",)),
    "replay": (replay, ("same seed",)),
    "another process": (another_process, ("replay",)),
    "noise": (noise, ("group", "another process", "reading")),
    "reading": (reading, ("replay",)),
    "copies": (copies, ("reading", "noise")),
    "redoing": (redoing, ("same seed",)),
    "ends": (ends, _BASE),
    "actions_left": (actions_left, ("step", "ends")),
    "outcome": (outcome, _BASE),
    "board": (board, _BASE),
    "after the end": (after_the_end, _BASE),
    "parsing": (parsing, _BASE),
    "expert": (expert, _BASE),
    "imports": (imports, _BASE),
}
"""Each contract with those without which its verdict means nothing."""


def main() -> int:
    """The command; its exit code is 1 if a contract is broken."""
    parser = argparse.ArgumentParser(description="Look for contracts that environments break.")
    parser.add_argument("--params", default="params.yaml", help="check every environment of this file")
    parser.add_argument("--id", help="check this environment instead: module:Id-v0")
    parser.add_argument("--settings", type=json.loads, default={}, help="its settings, as JSON")
    parser.add_argument("--solved", type=float, default=Bounds.solved, help="least share that the expert solves")
    arguments = parser.parse_args()
    bounds = Bounds(solved=arguments.solved)
    try:
        if arguments.id:
            sections = {arguments.id: Environment(id=arguments.id, settings=arguments.settings)}
        else:
            sections = load(arguments.params).environments
    except (UserError, ValueError) as error:
        print(error)
        return 1
    lines = [f"{name}: {line}" for name, one in sections.items() for line in check_environment(one, bounds=bounds)]
    print("\n".join(lines) or "ok")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
