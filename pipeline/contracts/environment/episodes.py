"""The contracts of how an episode goes and ends, and of the expert that plays it."""

import math
from collections.abc import Iterator
from typing import Any

from pipeline.contracts.environment.suite import Suite, short
from pipeline.environments.playing import actions_left_of, parse_action, step


def redoing(suite: Suite) -> Iterator[str]:
    """From a state_key back to the same state_key, the episode going on, the rewards sum to at most 0."""
    for environment, state, seed in suite.rounds():
        for loop in (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3):
            key = suite.opening(environment, seed, state)["state_key"]
            earned, done, least = 0.0, list[str](), {key: (0.0, 0)}
            for action, _, reward, over in suite.play(environment, seed, state, loop):
                earned += reward
                done.append(action)
                if over:
                    break
                key = environment.state_key
                before, since = least.get(key, (math.inf, 0))
                if earned > before + 1e-9:
                    way = " ".join(map(repr, done[since:][:4]))
                    yield f"back in state_key {short(key)} by way of {way}, {earned - before:g} richer"
                if earned < before:
                    least[key] = (earned, len(done))


def ends(suite: Suite) -> Iterator[str]:
    """Random play, and one allowed action again and again, end by themselves."""
    for environment, state, seed in suite.rounds():
        for loop in (0, 1, 1, 2):
            course = list(suite.play(environment, seed, state, loop))
            if len(course) == suite.bounds.longest and not course[-1][-1]:
                yield f"not over after {len(course)} actions, the last ones {course[-2][0]!r} {course[-1][0]!r}"


def actions_left(suite: Suite) -> Iterator[str]:
    """``actions_left``, if there is one, is what the prompt states: it never rises, and no episode outlasts it."""
    for environment, state, seed in suite.rounds():
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


def after_the_end(suite: Suite) -> Iterator[str]:
    """``step`` raises before the first reset and after the end."""
    for environment, state, seed in suite.rounds():
        for action, _, _, over in suite.play(environment, seed, state):
            if over:
                if _accepts(environment, action):
                    yield f"step({action!r}) is accepted after the end"
                if _accepts(suite.fresh(), action):
                    yield f"step({action!r}) is accepted before the first reset"


def expert(suite: Suite) -> Iterator[str]:
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
        for choose in (player.act, player.random_action):
            action = choose(environment, suite.draws)
            if hasattr(player, "plan") and not isinstance(player.plan(environment, action, suite.draws), str):
                yield f"plan does not return text for {short(action)}"
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
                if step(environment, action)[-1]:
                    break
            if environment.success:
                break
        else:
            unsolved.append(state)
    suite.place = f"(state_seed {', '.join(map(str, unsolved))})"
    if asked - len(unsolved) < suite.bounds.solved * asked:
        share, attempts = suite.bounds.solved, suite.bounds.attempts
        yield f"solves {asked - len(unsolved)} of {asked} instances in {attempts} attempts, less than {share:.0%}; not"


def _accepts(environment: Any, action: str) -> bool:
    try:
        environment.step(action)
    except Exception:
        return False
    return True
