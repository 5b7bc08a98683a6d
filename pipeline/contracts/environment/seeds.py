"""The contracts of what seeds decide, and of what may not change it: reading, and copies."""

import copy
from collections.abc import Iterator

from pipeline.contracts.environment.suite import Seen, Suite, parting, proceed, short


def same_seed(suite: Suite) -> Iterator[str]:
    """Equal seeds give an equal opening: in one instance, played or not, and in two."""
    one, other = suite.fresh(), suite.fresh()
    for state, seed in suite.states():
        for _ in suite.play(one, seed, state):
            pass
        for given in (None, state):
            first = suite.opening(one, seed, given)
            for again in (one, other):
                if difference := parting([first], [suite.opening(again, seed, given)]):
                    yield f"{'two instances' if again is other else 'two resets'} differ: {difference}"


def seed_used(suite: Suite) -> Iterator[str]:
    """Among several seeds two differ, in what is shown and in state_key, whether given as seed or as state_seed."""
    environment = suite.fresh()
    ways = {
        "seed": [suite.opening(environment, seed, None) for _, seed in suite.states()],
        "state_seed": [suite.opening(environment, 0, state) for state, _ in suite.states()],
    }
    suite.place = ""
    for way, openings in ways.items():
        if len({opening["state_key"] for opening in openings}) == 1:
            yield f"{len(openings)} values of {way} have one state_key, {short(openings[0]['state_key'])}"
        if len({(opening["observation"], opening["instructions"]) for opening in openings}) == 1:
            yield f"{len(openings)} values of {way} show one opening, {short(openings[0]['observation'])}"


def state_key(suite: Suite) -> Iterator[str]:
    """Initial states with one state_key show one opening: splits and groups go by the key."""
    environment, met = suite.fresh(), dict[str, tuple[Seen, int]]()
    for state in range(10 * suite.bounds.states):
        opening = suite.opening(environment, 0, state)
        first, place = met.setdefault(opening["state_key"], (opening, state))
        if difference := parting([first], [opening]):
            yield f"state_key {short(opening['state_key'])} also belongs to state_seed {place}, but {difference}"


def group(suite: Suite) -> Iterator[str]:
    """Members of a group, equal in state_seed and not in seed, share observation, instructions and state_key."""
    for environment, state, seed in suite.rounds():
        first = suite.opening(environment, seed, state)
        for member in (0, 1, 2**31 - 1):
            if difference := parting([first], [suite.opening(environment, member, state)]):
                yield f"differs from the member with seed {seed}: {difference}"


def replay(suite: Suite) -> Iterator[str]:
    """Equal seeds and actions give equal episodes, in one instance and in two."""
    one, other = suite.fresh(), suite.fresh()
    for state, seed in suite.states():
        played = suite.actions(seed, state)
        first = suite.replay(one, seed, state, played)
        for again in (one, other):
            if difference := parting(first, suite.replay(again, seed, state, played)):
                yield f"the same actions again: {difference}"


def reading(suite: Suite) -> Iterator[str]:
    """Reading state_key, instructions and success, and parsing, change nothing."""
    for environment, state, seed in suite.rounds():
        suite.reset(environment, seed, state)
        keys = [environment.state_key for _ in range(3)]
        if len(set(keys)) > 1:
            yield f"state_key changes when read: {short(keys)}"
        played = suite.actions(seed, state)
        quiet = suite.replay(environment, seed, state, played, reads=0)
        if difference := parting(quiet, suite.replay(environment, seed, state, played, reads=3)):
            yield f"goes on differently after reading: {difference}"


def copies(suite: Suite) -> Iterator[str]:
    """A deep copy in mid-episode goes on as the original does, and neither disturbs the other."""
    for environment, state, seed in suite.rounds():
        played = suite.actions(seed, state)
        for cut in {0, len(played) // 2}:
            whole = suite.replay(environment, seed, state, played)[cut:]
            suite.replay(environment, seed, state, played[:cut])
            twin = copy.deepcopy(environment)
            if twin.state_key != environment.state_key:
                yield f"state_key {short(environment.state_key)} of the original, {short(twin.state_key)} of the copy"
            for name, continued in (("copy", twin), ("original", environment)):
                if difference := parting(whole, proceed(continued, played[cut:])):
                    yield f"copied after {cut} actions, the {name} goes on differently: {difference}"
