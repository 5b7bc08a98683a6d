"""Making an environment by its gymnasium id, and saying in a line why one cannot be made."""

import difflib
import importlib.util
import inspect
import re
from typing import Any, cast

import gymnasium

from pipeline.environments.text_environment import TextEnvironment
from pipeline.settings.params import Environment
from pipeline.settings.section import MOST
from pipeline.workspace.errors import UserError, line_of, raised

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
        raise UserError(f"{refused}: {line_of(error)}; install it, or put its folder on PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"{refused}: importing {module} raised {raised(error)}") from error
    try:
        bare: Any = gymnasium.make(name, disable_env_checker=True, **environment.settings).unwrapped
    except UserError:
        raise
    except gymnasium.error.UnregisteredEnv:
        raise UserError(f"{refused}: it is not registered{_close(name)}") from None
    except gymnasium.error.Error as error:
        raise UserError(f"{refused}: {line_of(error)}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"environments: {name!r} refuses its settings: {line_of(error)}") from error
    except Exception as error:
        raise UserError(f"{refused}: its constructor raised {raised(error)}") from error
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


def _close(name: str) -> str:
    """Registered ids that look like an unknown one, ours first, and how an id names its module."""
    module, colon, own = name.rpartition(":")
    known = {entry.split("/")[-1]: entry for entry in [*gymnasium.registry, *OURS]}
    close = [known[found] for found in difflib.get_close_matches(own.split("/")[-1], known, n=2)]
    close = [entry if entry in OURS else f"{module}{colon}{entry}" for entry in close]
    guess = f"; did you mean {' or '.join(map(repr, sorted(close, key=lambda entry: entry not in OURS)))}?"
    return (guess if close else "") + ("" if module else " (an id of a module is written module:Id-v0)")
