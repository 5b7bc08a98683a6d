"""Rooms of Sokoban as drawn, and a search that shares no code with the expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.environments.sokoban import MOVES, Room, Sokoban, SokobanExpert

Cells = set[tuple[int, int]]


def parsed(rows: list[str]) -> dict[str, Cells]:
    """Where things are in a grid, by the published symbols."""
    meaning = {"#": "walls", "O": "targets", "√": "targets boxes", "X": "boxes", "P": "player", "S": "targets player"}
    found: dict[str, Cells] = {name: set() for name in ("walls", "targets", "boxes", "player")}
    for r, row in enumerate(rows):
        for c, symbol in enumerate(row):
            for name in meaning.get(symbol, "").split():
                found[name].add((r, c))
    return found


def bordered(inside: str) -> list[str]:
    """The rows of a room from the rows inside its border, separated by slashes."""
    rows = [f"#{row}#" for row in inside.split("/")]
    return ["#" * len(rows[0]), *rows, "#" * len(rows[0])]


def arranged(inside: str, **settings: Any) -> Sokoban:
    """An episode that starts in the room as drawn."""
    rows = bordered(inside)
    size, cells = len(rows), parsed(rows)
    environment = Sokoban(size=size, boxes=len(cells["boxes"]), **settings)
    environment.reset(seed=0)
    numbers = {name: frozenset(r * size + c for r, c in found) for name, found in cells.items()}
    environment.room = Room(size, numbers["walls"], numbers["targets"])
    (environment.player,), environment.boxes = numbers["player"], numbers["boxes"]
    return environment


def drawn(observation: str) -> list[str]:
    """The rows of an observation's grid."""
    return [row.replace(" ", "") for row in observation.split("\n") if row.startswith("#")]


def key_rows(environment: Sokoban) -> list[str]:
    return environment.state_key.split("/")


def shortest(rows: list[str]) -> int | None:
    """Least number of moves by plain breadth-first search over the drawn grid; None if it cannot be solved."""
    cells = parsed(rows)
    (player,) = cells["player"]
    layer, seen, moves = {(player, frozenset(cells["boxes"]))}, set(), 0
    while layer:
        if any(boxes == cells["targets"] for _, boxes in layer):
            return moves
        seen |= layer
        following = set()
        for (r, c), boxes in layer:
            for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                to, behind = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)
                if to in cells["walls"] or (to in boxes and (behind in cells["walls"] or behind in boxes)):
                    continue
                following.add((to, (boxes - {to}) | {behind} if to in boxes else boxes))
        layer, moves = following - seen, moves + 1
    return None


def finish(environment: Sokoban, expert: SokobanExpert, draws: np.random.Generator) -> int:
    """Let the expert play to the end; the number of its moves."""
    moves = 0
    while not environment.done:
        environment.step(expert.act(environment, draws))
        moves += 1
    return moves


def wander(environment: Sokoban, moves: int, draws: np.random.Generator) -> None:
    for _ in range(moves):
        if not environment.done:
            environment.step(list(MOVES)[int(draws.integers(4))])
