"""The contracts of what an environment takes and returns."""

from collections.abc import Iterator
from typing import Any

import gymnasium

from pipeline.contracts.environment.suite import Suite, short
from pipeline.environments.playing import actions_left_of, board_of, outcome_of, parse_action, success_of, text_of

REFUSED = ("", " ", "\n", "||", "<think>", "</answer>", "\x00\x01")
"""Never an action: nothing, the separator of actions, the tags of a response, control characters."""


def form(suite: Suite) -> Iterator[str]:
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


def actions(suite: Suite) -> Iterator[str]:
    """After every reset an allowed action is found: the expert's, or one that the texts name."""
    for environment, state, seed in suite.rounds():
        observation = suite.reset(environment, seed, state)
        if suite.action(environment, observation) is None:
            yield "parse_action allows nothing that the expert does or, without one, that the texts name"


def step(suite: Suite) -> Iterator[str]:
    """``step`` returns (str, finite number, flag, flag, dict) as the pipeline takes them; the attributes keep their types."""
    for environment, state, seed in suite.rounds():
        for _ in zip(suite.play(environment, seed, state), range(30), strict=False):
            _read(environment)
    yield from ()


def texts(suite: Suite) -> Iterator[str]:
    """Observations and instructions are not empty; observations and actions are as long as their spaces say."""
    for environment, state, seed in suite.rounds():
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


def outcome(suite: Suite) -> Iterator[str]:
    """``outcome``, if there is one, is text where an episode has ended, and none of the words for being cut off."""
    for environment, state, seed in suite.rounds():
        for *_, over in suite.play(environment, seed, state):
            if over:
                outcome_of(environment)
    yield from ()


def board(suite: Suite) -> Iterator[str]:
    """``board``, if the module has it, draws every state that a turn may begin in: the report calls it after training."""
    for environment, state, seed in suite.rounds():
        board_of(environment, suite.opening(environment, seed, state)["state_key"])
        for *_, over in suite.play(environment, seed, state):
            if not over:
                board_of(environment, environment.state_key)
    yield from ()


def parsing(suite: Suite) -> Iterator[str]:
    """``parse_action`` leaves its own results as they are, and refuses what is no action."""
    for environment, state, seed in suite.rounds():
        observation = suite.reset(environment, seed, state)
        for text in (*REFUSED, "x" * (environment.action_space.max_length + 1)):
            if parse_action(environment, text) is not None:
                yield f"{short(text)} is an allowed action"
        for _ in range(10):
            action = suite.action(environment, observation) or ""
            for text in (action, action.upper(), action.lower(), f" {action}\n"):
                parsed = action if text == action else parse_action(environment, text)
                if parsed is None:
                    continue
                again = parse_action(environment, parsed)
                if again != parsed:
                    yield f"the allowed action {parsed!r} parses as {again!r}"


def _read(environment: Any) -> None:
    """Read every attribute as the pipeline does, which refuses what it must not be."""
    text_of(environment, "instructions")
    text_of(environment, "state_key")
    success_of(environment)
    actions_left_of(environment)


def _misfit(name: str, text: str, space: Any) -> Iterator[str]:
    """Length alone: gymnasium's default characters are letters and digits, without even a space."""
    if not space.min_length <= len(text) <= space.max_length:
        yield f"{name} of {len(text)} characters, its space has {space.min_length} to {space.max_length}"
