"""Look for contracts that environments or a function break.

Without --id and --slot the environments of the params file are looked at. The exit code is 1 if one is broken.
"""

import json
from typing import Annotated, Any

import typer

from pipeline.commands.cli import ParamsFile, configured
from pipeline.workspace.errors import UserError


def json_object(text: str) -> dict[str, Any]:
    """Settings as they stand in a params file."""
    if not isinstance(found := json.loads(text), dict):
        raise ValueError("no JSON object")
    return found


Settings = typer.Option(parser=json_object, metavar="JSON", help="Settings of that environment or function.")


def main(
    params: ParamsFile = "params.yaml",
    id: Annotated[str | None, typer.Option(metavar="MODULE:ID", help="This environment, not the file's.")] = None,
    slot: Annotated[str | None, typer.Option(metavar="SLOT", help="The slot that --function is made for.")] = None,
    function: Annotated[str, typer.Option(metavar="MODULE:NAME", help="A function of yours.")] = "",
    settings: Annotated[dict[str, Any], Settings] = "{}",  # type: ignore[assignment]
    solved: Annotated[float, typer.Option(min=0, max=1, metavar="SHARE", help="Least that an expert solves.")] = 1.0,
) -> str:
    if bool(slot) != bool(function):
        raise UserError("--slot, --function: one is given without the other; allowed: both or neither")
    if settings and not (slot or id):
        raise UserError(
            "--settings: there is nothing to give them to; allowed: with --id, or with --slot and --function"
        )
    if slot:
        from pipeline.contracts.slot import check_slot

        broken = [f"{function}: {line}" for line in check_slot(slot, function, settings)]
    else:
        from pipeline.contracts.environment import Bounds, check_environment
        from pipeline.settings.params import Environment

        sections = {id: Environment(id=id, settings=settings)} if id else configured(params)[0].environments
        bounds = Bounds(solved=solved)
        broken = [f"{name}: {line}" for name, one in sections.items() for line in check_environment(one, bounds=bounds)]
    if broken:
        print("\n".join(broken))
        raise typer.Exit(1)
    return "ok"
