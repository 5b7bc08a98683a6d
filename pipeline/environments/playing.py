"""Playing an environment, ours or a user's own, with everything that it returns checked.

Every function raises a UserError where the environment raises, and where it returns what it must not.
"""

import math
import reprlib
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np

from pipeline.environments.text_environment import TextEnvironment, id_of
from pipeline.settings.section import MOST
from pipeline.trajectories.trajectory import CUT_OFF
from pipeline.workspace.errors import UserError, raised


def reset(environment: TextEnvironment, seed: int, state_seed: int | None) -> str:
    """Start an episode; returns the observation. Without a ``state_seed`` the state is drawn from ``seed`` as well."""
    options = None if state_seed is None else {"state_seed": state_seed}
    returned = _called(environment, ("reset",), environment.reset, seed=seed, options=options)
    (observation,) = _parts(environment, returned, ("reset",), "observation, information")
    return _text(environment, "an observation", observation, ("reset",))


def step(environment: TextEnvironment, action: str) -> tuple[str, float, bool]:
    """Act; returns the observation, the reward and whether the episode is over."""
    observation, reward, terminated, truncated = transition(environment, action)
    return observation, reward, terminated or truncated


def transition(environment: TextEnvironment, action: str) -> tuple[str, float, bool, bool]:
    """Act; returns observation, reward, terminated and truncated, as Python's own types.

    A reward is any finite number of at most ``MOST``, of NumPy too, or a truth value; a flag is a truth value, Python's or
    NumPy's.
    """
    place = ("step", action)
    returned = _called(environment, place, environment.step, action)
    parts = _parts(environment, returned, place, "observation, reward, terminated, truncated, information")
    observation, given, terminated, truncated = parts
    reward = _reward(environment, given, place)
    ends = _flag(environment, "terminated ", terminated, place), _flag(environment, "truncated ", truncated, place)
    return _text(environment, "an observation", observation, place), reward, *ends


def parse_action(environment: TextEnvironment, text: str) -> str | None:
    """The canonical form of an action that is allowed now, or None."""
    place = ("parse_action", text)
    parsed = _called(environment, place, environment.parse_action, text)
    if parsed is None:
        return None
    action = _text(environment, "an action", parsed, place, "text or None")
    if "||" in action:
        _refuse(environment, repr(action), place, "text without ||, which separates a turn's actions, or None")
    return action


def text_of(environment: TextEnvironment, name: str) -> str:
    """``instructions``, ``state_key`` or ``outcome``."""
    return _text(environment, "a value", _called(environment, (name,), getattr, environment, name), (name,))


def success_of(environment: TextEnvironment) -> bool:
    """Whether the episode has reached its aim."""
    value = _called(environment, ("success",), getattr, environment, "success")
    return _flag(environment, "", value, ("success",))


def actions_left_of(environment: TextEnvironment) -> int | None:
    """How many actions are left, if the environment says so: None if it has no ``actions_left``, or that is None."""
    value = _called(environment, ("actions_left",), getattr, environment, "actions_left", None)
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        _refuse(environment, reprlib.repr(value), ("actions_left",), "a whole number of at least 0, or None")
    return int(value)


def outcome_of(environment: TextEnvironment) -> str:
    """How an episode that the environment has ended went: its ``outcome``, none of ``CUT_OFF``, or else goal or failed."""
    if not hasattr(type(environment), "outcome") and "outcome" not in vars(environment):
        return "goal" if success_of(environment) else "failed"
    outcome = text_of(environment, "outcome")
    if outcome in CUT_OFF:
        meant = f"{' and '.join(CUT_OFF)} mark episodes that were cut off"
        _refuse(environment, repr(outcome), ("outcome",), f"another word: {meant}")
    return outcome


def board_of(environment: TextEnvironment, state_key: str) -> list[list[str]] | None:
    """Rows of cells that draw a state, by the function ``board(state_key)`` of the environment's module, if it has one."""
    draw = getattr(sys.modules[type(environment).__module__], "board", None)
    if draw is None:
        return None
    place = ("board", state_key)
    rows: list[list[str]] = _called(environment, place, lambda: [list(row) for row in draw(state_key)])
    if len({len(row) for row in rows}) != 1 or not all(isinstance(cell, str) for row in rows for cell in row):
        _refuse(environment, reprlib.repr(rows), place, "rows of text, all of one length")
    return rows


Place = tuple[str, ...]
"""What was called, and with which text; put into words only where something is wrong."""


def _called(environment: TextEnvironment, place: Place, ask: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a call into the environment's code gives; what it raises is told in a line."""
    try:
        return ask(*given, **named)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"environments: {id_of(environment)!r}: {_said(place)} raised {raised(error)}") from error


def _parts(environment: TextEnvironment, returned: Any, place: Place, names: str) -> tuple[Any, ...]:
    """The parts of a tuple with these names; the last one, information, is checked and left out."""
    if not isinstance(returned, tuple) or len(returned) != names.count(",") + 1:
        kind = f"tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        _refuse(environment, f"a {kind}", place, f"({names})")
    if not isinstance(returned[-1], dict):
        _refuse(environment, f"information of type {type(returned[-1]).__name__}", place, "a dict")
    return returned[:-1]


def _reward(environment: TextEnvironment, value: Any, place: Place) -> float:
    if type(value) is float and abs(value) <= MOST:  # nearly always; the rest takes a microsecond
        return value
    try:
        number = float(value) if isinstance(value, (Real, np.bool_)) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(environment, f"the reward {reprlib.repr(value)}", place, "a finite number")
    if abs(number) > MOST:
        _refuse(environment, f"the reward {number:g}", place, f"of a size of at most {MOST:g}")
    return number


def _text(environment: TextEnvironment, what: str, value: Any, place: Place, allowed: str = "text") -> str:
    if not isinstance(value, str):
        _refuse(environment, f"{what} of type {type(value).__name__}", place, allowed)
    return value


def _flag(environment: TextEnvironment, what: str, value: Any, place: Place) -> bool:
    if not isinstance(value, bool | np.bool_):
        _refuse(environment, f"{what}{reprlib.repr(value)}", place, "True or False")
    return bool(value)


def _refuse(environment: TextEnvironment, returned: str, place: Place, allowed: str) -> NoReturn:
    asked = f"{id_of(environment)!r} returned {returned} from {_said(place)}"
    raise UserError(f"environments: {asked}; it must be {allowed}")


def _said(place: Place) -> str:
    name, *arguments = place
    return f"{name}({reprlib.repr(arguments[0])})" if arguments else name
