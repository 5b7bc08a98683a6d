"""Print the methods of a params file: status, source, slots.

A method shows the slots in which it differs from the file's defaults, which stand last.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.cli import configured


def main(params: Annotated[str, typer.Option(metavar="FILE", help="Default: the preset `methods`.")] = "") -> str:
    from pipeline.report.methods import method_table
    from pipeline.settings.presets import load_preset

    config = configured(params)[0] if params else load_preset("methods", Path("."))
    return method_table(config.methods, config.method_defaults)
