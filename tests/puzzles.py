"""Puzzles of Sudoku worked by hand, and a solver that shares no code with ours."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.environments.sudoku import Sudoku

SOLUTION = (1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1)
SEVEN = (1, 2, 0, 4, 0, 4, 1, 0, 0, 1, 4, 0, 4, 0, 0, 1)
"""Seven empty cells of ``SOLUTION``:   1 2 . 4 / . 4 1 . / . 1 4 . / 4 . . 1"""
FOUR = (0, 2, 3, 4, 3, 4, 0, 2, 2, 0, 4, 3, 4, 3, 2, 0)
"""Four empty cells, each a 1:          . 2 3 4 / 3 4 . 2 / 2 . 4 3 / 4 3 2 ."""


def given(puzzle: tuple[int, ...], max_actions: int = 16, candidates: bool = True) -> Sudoku:
    """An episode of a puzzle whose solution is ``SOLUTION``."""
    environment = Sudoku(givens=16 - puzzle.count(0), max_actions=max_actions, candidates=candidates)
    environment.reset(seed=0)
    environment.puzzle, environment.solution, environment.board = puzzle, SOLUTION, list(puzzle)
    return environment


def started(state: int, **settings: Any) -> Sudoku:
    environment = Sudoku(**settings)
    environment.reset(seed=0, options={"state_seed": state})
    return environment


def anywhere(draws: np.random.Generator) -> str:
    """Any digit in any cell."""
    return ",".join(map(str, draws.integers(1, 5, size=3)))


def solutions(board: list[int]) -> int:
    """Number of ways to complete a board, by brute force."""
    if 0 not in board:
        return 1
    cell = board.index(0)
    count = 0
    for digit in (1, 2, 3, 4):
        if all(board[other] != digit for other in range(16) if share_a_unit(cell, other)):
            count += solutions([*board[:cell], digit, *board[cell + 1 :]])
    return count


def share_a_unit(cell: int, other: int) -> bool:
    same_row, same_column = cell // 4 == other // 4, cell % 4 == other % 4
    return same_row or same_column or (cell // 8 == other // 8 and cell % 4 // 2 == other % 4 // 2)
