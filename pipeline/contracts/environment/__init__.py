"""The contracts that every environment keeps, ours and a user's own, and a suite that looks for broken ones.

    actfocus contracts --id lamps:Lamps-v0 --settings '{"faulty": 0.1}'

``CONTRACTS`` says what is checked, in order. docs/environments.md says why.
"""

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.contracts.environment.another_process import another_process, imports
from pipeline.contracts.environment.episodes import actions_left, after_the_end, ends, expert, redoing
from pipeline.contracts.environment.interface import actions, board, form, outcome, parsing, step, texts
from pipeline.contracts.environment.randomness import noise
from pipeline.contracts.environment.seeds import copies, group, reading, replay, same_seed, seed_used, state_key
from pipeline.contracts.environment.suite import BOUNDS, Bounds, Suite
from pipeline.settings.params import Environment
from pipeline.workspace.errors import UserError

__all__ = ["CONTRACTS", "Bounds", "check_environment"]

_BASE = ("form", "actions", "step")
CONTRACTS: dict[str, tuple[Callable[[Suite], Iterator[str]], tuple[str, ...]]] = {
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


def check_environment(environment: Environment, expert: Any = None, bounds: Bounds = BOUNDS) -> list[str]:
    """A line per broken contract: its name, what was seen, the seeds. A contract that needs a broken one is left out.

    Without an ``expert``, ``expert()`` of the environment's module plays it, if it is there.
    """
    try:
        suite = Suite(environment, expert, bounds)
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
