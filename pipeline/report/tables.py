"""Tables that people read: cells, as Markdown, and as text for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """Cells ready to be shown."""

    title: str
    header: list[str]
    rows: list[list[str]]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    text: str = tabulate(lines, tablefmt="plain", disable_numparse=True)
    return text


def markdown(table: Table) -> str:
    """A table as Markdown, without its title; the first column is code."""
    lines = [table.header, ["---"] * len(table.header), *([f"`{row[0]}`", *row[1:]] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
