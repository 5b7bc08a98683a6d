"""Look for contracts that environments or a function break.

Without --id and --slot the environments of the params file are looked at. The exit code is 1 if one is broken.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipeline.commands.cli import ParamsFile, configured

Settings = Annotated[str, typer.Option(metavar="JSON", help="Settings of that environment or function.")]


def main(
    params: ParamsFile = "params.yaml",
    id: Annotated[str | None, typer.Option(metavar="MODULE:ID", help="This environment, not the file's.")] = None,
    slot: Annotated[str | None, typer.Option(metavar="SLOT", help="The slot that --function is made for.")] = None,
    function: Annotated[str | None, typer.Option(metavar="MODULE:NAME", help="A function of yours.")] = None,
    settings: Settings = "{}",
    solved: Annotated[float, typer.Option(min=0, max=1, help="Least share of states that an expert solves.")] = 1.0,
) -> str:
    from pipeline.workspace.errors import UserError

    if (slot is None) != (function is None):
        raise UserError("--slot, --function: one needs the other; allowed: both, or neither")
    if slot is not None and function is not None:
        found = broken_by_function(slot, function, parsed(settings))
    else:
        found = broken_by_environments(params, id, parsed(settings), solved)
    if found:
        print("\n".join(found))
        raise typer.Exit(1)
    return "ok"


def parsed(settings: str) -> dict[str, Any]:
    """The option --settings.

    Raises:
        UserError: it is no JSON object.
    """
    from pipeline.workspace.errors import UserError

    try:
        found = json.loads(settings)
    except ValueError as error:
        raise UserError(f"--settings: {settings!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"--settings: {settings!r} is not allowed; allowed: a JSON object")
    return found


def broken_by_environments(params: str, id: str | None, settings: dict[str, Any], solved: float) -> list[str]:
    """A line per contract that an environment breaks: the one of that id, or else each of the params file's."""
    from pipeline.contracts.environment import Bounds, check_environment
    from pipeline.settings.params import Environment

    sections = {id: Environment(id=id, settings=settings)} if id else configured(params)[0].environments
    bounds = Bounds(solved=solved)
    return [f"{name}: {line}" for name, one in sections.items() for line in check_environment(one, bounds=bounds)]


def broken_by_function(slot: str, function: str, settings: dict[str, Any]) -> list[str]:
    """A line per contract of the slot that the function breaks."""
    from pipeline.contracts.slot import check_slot  # type: ignore[import-not-found, unused-ignore]

    return [f"{function}: {line}" for line in check_slot(slot, function, settings)]
