"""Looking for broken contracts of an environment: which there are, in order, and the command."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.contracts.environment.another_process import another_process, imports
from pipeline.contracts.environment.episodes import actions_left, after_the_end, ends, redoing
from pipeline.contracts.environment.expert import expert
from pipeline.contracts.environment.interface import actions, board, form, outcome, parsing, step, texts
from pipeline.contracts.environment.noise import noise
from pipeline.contracts.environment.seeds import copies, group, reading, replay, same_seed, seed_used, state_key
from pipeline.contracts.environment.suite import BOUNDS, Bounds, Suite
from pipeline.settings.params import Environment, load
from pipeline.workspace.errors import UserError

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
    """Look for broken contracts.

    Args:
        environment: id and settings, as under ``environments`` in params.yaml.
        expert: plays the environment; without one, ``expert()`` of the environment's module if it is there.
        bounds: how far to look.

    Returns:
        A line per broken contract: its name, what was seen, the seeds. A contract that needs a broken one is left out.
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
