"""The contract of what is random: it follows the seed of the episode."""

import itertools
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from pipeline.contracts.environment.suite import Seen, Suite, proceed, short

PLAYS = 3
"""Random episodes of each initial state in which ``noise`` looks for something random."""
REACHED = 20_000
"""Objects that are looked at for generators; those nearest to the environment come first."""
_OPAQUE = (type(None), str, bytes, int, float, type, ModuleType, FunctionType, np.ndarray)
"""What holds no generator, or other environments' too."""


def noise(suite: Suite) -> Iterator[str]:
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


def _rolled(
    suite: Suite, environment: Any, seed: int, state: int, actions: Sequence[str]
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


def _forks(course: Sequence[Seen], actions: Sequence[str], followed: dict[tuple[str, str], str]) -> str:
    """Where an action in a state leads elsewhere than it did before; what it leads to is added to ``followed``."""
    for (start, after), action in zip(itertools.pairwise(course), actions, strict=False):
        if after["terminated"] or after["truncated"]:
            break  # that the actions have run out may be seen in the key of an end
        key, arrived = start["state_key"], after["state_key"]
        known = followed.setdefault((key, action), arrived)
        if known != arrived:
            return f"step({action!r}) in state_key {short(key)} leads to {short(known)} and to {short(arrived)}"
    return ""
