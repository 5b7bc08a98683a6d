"""Simulate how often intervals and verdicts are wrong.

The tables of docs/statistics.md are written anew. Takes some minutes; needs no run.
"""

from pathlib import Path
from typing import Annotated

import typer

MARKS = "<!-- {0}: written by `make simulate` -->", "<!-- /{0} -->"


def main(
    trials: Annotated[int, typer.Option(metavar="COUNT", help="Comparisons per cell.")] = 2000,
) -> str:
    from pipeline.report.publishing import replace_block
    from pipeline.report.simulated import simulated_blocks
    from pipeline.workspace.errors import UserError

    if not 100 <= trials <= 100_000:
        raise UserError(f"--trials: {trials}; allowed: 100 to 100000")
    document = Path("docs/statistics.md")
    if not document.exists():
        raise UserError(f"{document}: no such file; run this in the project's root")
    for name, content in simulated_blocks(trials):
        replace_block(document, name, content, MARKS)
    return f"{document}: {trials} comparisons a cell. Next: git diff {document}"
