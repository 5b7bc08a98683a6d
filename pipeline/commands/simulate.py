"""Simulate what intervals and verdicts keep of what they promise, into docs/statistics.md.

Takes some minutes; needs no run.
"""

from pathlib import Path
from typing import Annotated

import typer

MARKS = "<!-- {0}: written by `make simulate` -->", "<!-- /{0} -->"


def main(
    trials: Annotated[int, typer.Option(min=100, max=100_000, help="Simulated comparisons of a cell.")] = 2000,
) -> str:
    from pipeline.report.publishing import replace_block
    from pipeline.report.simulated import simulated_blocks
    from pipeline.workspace.errors import UserError

    document = Path("docs/statistics.md")
    if not document.exists():
        raise UserError(f"{document}: no such file; run this in the project's root")
    for name, content in simulated_blocks(trials):
        replace_block(document, name, content, MARKS)
    return f"{document}: {trials} comparisons a cell. Next: git diff {document}"
