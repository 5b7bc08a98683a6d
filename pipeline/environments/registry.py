"""Making environments by gymnasium id, playing them with what they return checked, and splitting their initial states."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import math
import re
import reprlib
import sys
import traceback
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import gymnasium
import numpy as np

from pipeline.settings.params import Environment
from pipeline.settings.section import MOST
from pipeline.trajectories.trajectory import CUT_OFF
from pipeline.workspace.errors import UserError

SPLITS = {"demonstrations": 30, "train": 50, "validation": 10, "test": 10}
"""Per cent of all states, by the hash of the state."""

OURS = {
    "actfocus/FrozenLake-v1": "pipeline.environments.frozen_lake:FrozenLake",
    "actfocus/Sokoban-v1": "pipeline.environments.sokoban:Sokoban",
    "actfocus/Sudoku-v1": "pipeline.environments.sudoku:Sudoku",
    "actfocus/Bandit-v1": "pipeline.environments.bandit:Bandit",
    "actfocus/WebShop-v1": "pipeline.environments.webshop.environment:WebShop",
}
"""Id -> class; a module is imported when its environment is made."""

EXTRAS = {
    "actfocus/ReasoningGym-v1": ("pipeline.environments.reasoning_tasks:ReasoningTask", "reasoning-gym"),
    "actfocus/TextArena-v1": ("pipeline.environments.textarena_games:TextArenaGame", "textarena"),
}
"""Id -> class, and the optional package that it adapts, which is also the name of the extra that installs it."""

for _id, _class in (OURS | {name: adapter for name, (adapter, _) in EXTRAS.items()}).items():
    gymnasium.register(id=_id, entry_point=_class, disable_env_checker=True)


class TextEnvironment(Protocol):
    """A ``gymnasium.Env`` with text observations and actions, and four attributes.

    ``reset(seed=, options={"state_seed": s})`` draws the initial state from ``state_seed`` and everything that happens
    afterwards from ``seed``, so that the members of a group share the state but not the noise. With no ``state_seed``
    the state is drawn from ``seed`` as well.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Also other numbers and truth values, of NumPy too: see ``transition``."""

    @property
    def instructions(self) -> str:
        """The task, its symbols, actions and limits, in the numbers of this instance."""

    @property
    def state_key(self) -> str:
        """The environment's own state, complete enough to tell two states apart."""

    @property
    def success(self) -> bool:
        """Whether the episode has reached its aim."""

    def parse_action(self, text: str) -> str | None:
        """The canonical form of an action that is allowed now, or None."""


def make(environment: Environment) -> TextEnvironment:
    """Construct an environment from its section of ``params.yaml``; its ``spec.id`` is the id that stands there.

    Raises:
        UserError: unknown id, a module that cannot be imported, an extra that is not installed, or settings that the
            constructor refuses.
    """
    name = environment.id
    module, refused = name.rpartition(":")[0], f"environments: id {environment.id!r} cannot be made"
    _, extra = EXTRAS.get(name, ("", ""))
    if extra and importlib.util.find_spec(extra.replace("-", "_")) is None:
        raise UserError(f"environments: id {name!r} needs the package {extra}: pip install -e '.[{extra}]'")
    try:
        if module:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{refused}: {_line(error)}; install it, or put its folder on PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"{refused}: importing {module} raised {_raised(error)}") from error
    try:
        bare: Any = gymnasium.make(name, disable_env_checker=True, **environment.settings).unwrapped
    except UserError:
        raise
    except gymnasium.error.UnregisteredEnv:
        raise UserError(f"{refused}: it is not registered{_close(name)}") from None
    except gymnasium.error.Error as error:
        raise UserError(f"{refused}: {_line(error)}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"environments: {name!r} refuses its settings: {_line(error)}") from error
    except Exception as error:
        raise UserError(f"{refused}: its constructor raised {_raised(error)}") from error
    needed = ("instructions", "state_key", "success", "parse_action")
    missing = [n for n in needed if not hasattr(type(bare), n) and n not in vars(bare)]
    if missing:
        raise UserError(f"environments: {name!r} lacks {', '.join(missing)} (see TextEnvironment)")
    _check_numbers(bare, environment.settings)
    bare.spec.id = name  # gymnasium leaves the module out
    return cast(TextEnvironment, bare)


def _check_numbers(environment: Any, settings: dict[str, Any]) -> None:
    """What a constructor annotates as a number is one: YAML's true passes for 1 in Python, and 4.0 for 4."""
    for name, parameter in inspect.signature(type(environment).__init__).parameters.items():
        kinds = set(re.findall(r"\w+", getattr(parameter.annotation, "__name__", str(parameter.annotation))))
        value = settings.get(name)
        if value is None or not {"int", "float"} & kinds or not kinds <= {"int", "float", "None"}:
            continue
        whole = "float" not in kinds
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not (whole or abs(value) <= MOST):
            said, allowed = str(value).lower(), "a whole number" if whole else f"a number from {-MOST:g} to {MOST:g}"
            raise UserError(
                f"environments: {environment.spec.id!r} refuses its settings: {name}: {said}; allowed: {allowed}"
            )


def reset(environment: TextEnvironment, seed: int, state_seed: int | None) -> str:
    """Start an episode; returns the observation. Without a ``state_seed`` the state is drawn from ``seed`` as well.

    Raises:
        UserError: the environment raised, or did not return (text, dict).
    """
    options = None if state_seed is None else {"state_seed": state_seed}
    try:
        returned: Any = environment.reset(seed=seed, options=options)
    except Exception as error:
        raise _failed(environment, ("reset",), error) from error
    if not isinstance(returned, tuple) or len(returned) != 2:
        _refuse(environment, _shape(returned), ("reset",), "(observation, information)")
    _information(environment, returned[1], ("reset",))
    return _text(environment, "an observation", returned[0], ("reset",))


def step(environment: TextEnvironment, action: str) -> tuple[str, float, bool]:
    """Act; returns the observation, the reward and whether the episode is over. Raises as ``transition`` does."""
    observation, reward, terminated, truncated = transition(environment, action)
    return observation, reward, terminated or truncated


def transition(environment: TextEnvironment, action: str) -> tuple[str, float, bool, bool]:
    """Act; returns observation, reward, terminated and truncated, as Python's own types.

    A reward is any real number, of NumPy too, or a truth value; a flag is a truth value, Python's or NumPy's.

    Raises:
        UserError: the environment raised, or did not return (text, finite number, flag, flag, dict).
    """
    place = ("step", action)
    try:
        returned: Any = environment.step(action)
    except Exception as error:
        raise _failed(environment, place, error) from error
    if not isinstance(returned, tuple) or len(returned) != 5:
        _refuse(environment, _shape(returned), place, "(observation, reward, terminated, truncated, information)")
    observation, given, terminated, truncated, information = returned
    reward = _reward(environment, given, place)
    for name, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, _BOOLS):
            _refuse(environment, f"{name} {reprlib.repr(value)}", place, "True or False")
    _information(environment, information, place)
    return _text(environment, "an observation", observation, place), reward, bool(terminated), bool(truncated)


def parse_action(environment: TextEnvironment, text: str) -> str | None:
    """The canonical form of an action that is allowed now, or None.

    Raises:
        UserError: the environment raised, or returned neither.
    """
    place = ("parse_action", text)
    try:
        parsed = environment.parse_action(text)
    except Exception as error:
        raise _failed(environment, place, error) from error
    if parsed is None:
        return None
    if "||" in _text(environment, "an action", parsed, place, "text or None"):
        _refuse(environment, repr(parsed), place, "text without ||, which separates a turn's actions, or None")
    return parsed


def text_of(environment: TextEnvironment, name: str) -> str:
    """``instructions``, ``state_key`` or ``outcome``.

    Raises:
        UserError: reading it raised, or it is not text.
    """
    try:
        value = getattr(environment, name)
    except Exception as error:
        raise _failed(environment, (name,), error) from error
    return _text(environment, "a value", value, (name,))


def success_of(environment: TextEnvironment) -> bool:
    """Whether the episode has reached its aim.

    Raises:
        UserError: reading it raised, or it is not a truth value.
    """
    try:
        value: Any = environment.success
    except Exception as error:
        raise _failed(environment, ("success",), error) from error
    if not isinstance(value, _BOOLS):
        _refuse(environment, reprlib.repr(value), ("success",), "True or False")
    return bool(value)


def actions_left_of(environment: TextEnvironment) -> int | None:
    """How many actions are left, if the environment says so: None if it has no ``actions_left``, or that is None.

    Raises:
        UserError: reading it raised, or it is not a whole number of at least 0.
    """
    try:
        value: Any = getattr(environment, "actions_left", None)
    except Exception as error:
        raise _failed(environment, ("actions_left",), error) from error
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        _refuse(environment, reprlib.repr(value), ("actions_left",), "a whole number of at least 0, or None")
    return int(value)


def outcome_of(environment: TextEnvironment) -> str:
    """How an episode that the environment has ended went: its ``outcome`` if it has one, else goal or failed.

    Raises:
        UserError: reading it raised, it is not text, or it is one of ``CUT_OFF``.
    """
    if not hasattr(type(environment), "outcome") and "outcome" not in vars(environment):
        return "goal" if success_of(environment) else "failed"
    outcome = text_of(environment, "outcome")
    if outcome in CUT_OFF:
        meant = f"{' and '.join(CUT_OFF)} mark episodes that were cut off"
        _refuse(environment, repr(outcome), ("outcome",), f"another word: {meant}")
    return outcome


def board_of(environment: TextEnvironment, state_key: str) -> list[list[str]] | None:
    """Rows of cells that draw a state, by the function ``board(state_key)`` of the environment's module, if it has one.

    Raises:
        UserError: the function raised, or did not return rows of text of one length.
    """
    draw = getattr(sys.modules[type(environment).__module__], "board", None)
    if draw is None:
        return None
    place = ("board", state_key)
    try:
        rows = [list(row) for row in draw(state_key)]
    except Exception as error:
        raise _failed(environment, place, error) from error
    if len({len(row) for row in rows}) != 1 or not all(isinstance(cell, str) for row in rows for cell in row):
        _refuse(environment, reprlib.repr(rows), place, "rows of text, all of one length")
    return rows


def id_of(environment: Any) -> str:
    """The id by which ``make`` was asked for an environment; its class's name if ``make`` did not make it."""
    spec = getattr(environment, "spec", None)
    return str(spec.id) if spec is not None else type(environment).__name__


_BOOLS = (bool, np.bool_)

Place = tuple[str, ...]
"""What was called, and with which text; put into words only where something is wrong."""


def _failed(environment: TextEnvironment, place: Place, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"environments: {id_of(environment)!r}: {_said(place)} raised {_raised(error)}")


def _information(environment: TextEnvironment, value: Any, place: Place) -> None:
    if not isinstance(value, dict):
        _refuse(environment, f"information of type {type(value).__name__}", place, "a dict")


def _reward(environment: TextEnvironment, value: Any, place: Place) -> float:
    if type(value) is float and math.isfinite(value):  # nearly always; the rest takes a microsecond
        return value
    try:
        number = float(value) if isinstance(value, (Real, np.bool_)) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(environment, f"the reward {reprlib.repr(value)}", place, "a finite number")
    return number


def _text(environment: TextEnvironment, what: str, value: Any, place: Place, allowed: str = "text") -> str:
    if not isinstance(value, str):
        _refuse(environment, f"{what} of type {type(value).__name__}", place, allowed)
    return value


def _refuse(environment: TextEnvironment, returned: str, place: Place, allowed: str) -> NoReturn:
    asked = f"{id_of(environment)!r} returned {returned} from {_said(place)}"
    raise UserError(f"environments: {asked}; it must be {allowed}")


def _said(place: Place) -> str:
    name, *arguments = place
    return f"{name}({reprlib.repr(arguments[0])})" if arguments else name


def _shape(returned: Any) -> str:
    return f"a tuple of {len(returned)}" if isinstance(returned, tuple) else f"a {type(returned).__name__}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _raised(error: Exception) -> str:
    """An exception in a line, and where it came from, which a SyntaxError says itself."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(place.filename).name}, line {place.lineno})"
    return f"{type(error).__name__}: {_line(error)}{where}"


def _close(name: str) -> str:
    """Registered ids that look like an unknown one, ours first, and how an id names its module."""
    module, colon, own = name.rpartition(":")
    known = {entry.split("/")[-1]: entry for entry in [*gymnasium.registry, *OURS]}
    close = [known[found] for found in difflib.get_close_matches(own.split("/")[-1], known, n=2)]
    close = [entry if entry in OURS else f"{module}{colon}{entry}" for entry in close]
    guess = f"; did you mean {' or '.join(map(repr, sorted(close, key=lambda entry: entry not in OURS)))}?"
    return (guess if close else "") + ("" if module else " (an id of a module is written module:Id-v0)")


def environment_label(environment: Environment) -> str:
    """Id with version, as trajectories record it."""
    return environment.id


def split_of(state_key: str) -> str:
    """The split that an initial state belongs to, by a hash of the state itself: equal states never cross splits."""
    digest = hashlib.blake2b(state_key.encode(errors="surrogatepass"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("shares sum to 100")


def initial_states(
    environment: TextEnvironment, split: str, count: int, draws: np.random.Generator, distinct: bool = False
) -> list[int]:
    """State seeds of ``count`` initial states of a split.

    Args:
        environment: any instance; it is reset.
        split: a key of ``SPLITS``.
        count: how many.
        draws: where candidate seeds come from.
        distinct: refuse a state that is already among them.

    Raises:
        UserError: fewer than ``count`` such states turned up in 400 tries for each, or see ``reset``.
    """
    found: list[int] = []
    seen: set[str] = set()
    for _ in range(400 * count):
        candidate = int(draws.integers(2**31))
        reset(environment, 0, candidate)
        state = text_of(environment, "state_key")
        if split_of(state) != split or (distinct and state in seen):
            continue
        seen.add(state)
        found.append(candidate)
        if len(found) == count:
            return found
    raise UserError(f"environments: only {len(found)} of {count} initial states found in split {split!r}")
