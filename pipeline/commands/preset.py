"""Write a preset's params file, from params.yaml and its overlay."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.cli import ParamsFile, go_to_root


def main(
    name: Annotated[str, typer.Option(metavar="NAME", help="A folder of presets/.")], params: ParamsFile = "params.yaml"
) -> str:
    from pipeline.settings.presets import resolve_preset

    go_to_root(params)
    return f"{resolve_preset(name, Path('.'))}. Next: make repro PRESET={name}"
