"""What environments on a grid share: which observations draw it, and what can be reached from a cell."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Cell = TypeVar("Cell", bound=Hashable)


def check_grid(grid: str) -> None:
    """Refuse, with a ValueError, what does not say in which observations the grid is drawn."""
    if grid not in ("always", "first", "never"):
        raise ValueError(f"grid must be always, first or never, got {grid!r}")


def distances(start: Cell, neighbours: Callable[[Cell], Iterable[Cell]]) -> dict[Cell, int]:
    """Least number of steps from ``start`` to each cell that can be reached from it."""
    found, queue = {start: 0}, [start]
    for cell in queue:
        for neighbour in neighbours(cell):
            if neighbour not in found:
                found[neighbour] = found[cell] + 1
                queue.append(neighbour)
    return found
