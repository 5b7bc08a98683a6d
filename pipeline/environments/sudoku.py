"""Sudoku of 4x4 cells, described in text.

There are only 288 filled grids, so that the solver is a table of them all: a puzzle is solved by the grids that agree
with its givens, and unique if there is exactly one.
"""

import re
from functools import lru_cache

import gymnasium
import numpy as np
from numpy.typing import NDArray

from pipeline.environments.draws import one_of, state_draws, wording
from pipeline.environments.episodic import Episodic, Expert, check_flag, check_whole
from pipeline.workspace.errors import UserError

SIDE, BOX = 4, 2
CELLS, DIGITS = range(SIDE**2), range(1, SIDE + 1)
"""Cells are numbered row by row; a board has 0 where a cell is empty."""

RIGHT, WRONG, INVALID, SOLVED = 1.0, 0.5, -0.1, 10.0
"""Rewards: a cell's first digit, as in the solution or not; a move that is refused; the solution, on top."""

TRIES = 10_000
"""Sets of givens tried for one puzzle. Of the sets of 4, the rarest, one in 20 is unique."""

_NAMES = [f"{cell // SIDE + 1},{cell % SIDE + 1}" for cell in CELLS]

_ROW, _COLUMN, _DIGIT = (rf"\s*(?P<{name}>\d{{1,2}})\s*" for name in ("row", "column", "digit"))
_PLACE = re.compile(rf"\s*place{_DIGIT}at\s*row{_ROW}col{_COLUMN}", re.IGNORECASE | re.ASCII)
_TRIPLE = re.compile(f"{_ROW},{_COLUMN},{_DIGIT}", re.ASCII)


class Sudoku(Episodic):
    """Fill every empty cell so that rows, columns and boxes have each digit once. The solution is unique.

    A move places a digit. It is invalid if row, column or digit is outside 1 to 4, the cell is a given, or another cell
    of its row, column or box has the digit; that costs an action and ``INVALID``, and changes nothing else. Any other
    move is carried out, and a digit that was placed may be overwritten: wrong digits stand in the way of right ones.
    Only the first digit in a cell is paid for, ``RIGHT`` or ``WRONG``; overwriting earns 0, whatever comes of it. No move
    empties a cell, so that a board met again has the same cells filled and nothing was earned in between. The move that
    completes the solution earns ``SOLVED`` as well.

    Args:
        size: side of the board in cells; only 4.
        givens: number of cells filled at the start, 4 (fewer never have a unique solution) to 15.
        max_actions: moves, invalid ones too, after which the episode is cut off; at least the number of empty cells.
        candidates: list, in every observation, the digits that each empty cell's row, column and box lack; the cells
            with the fewest come first.

    Raises:
        ValueError: a setting outside these limits.
    """

    observation_space = gymnasium.spaces.Text(max_length=1000)
    allowed = "like '1,2,3' or 'place 3 at row 1 col 2'"

    def __init__(self, size: int = 4, givens: int = 8, max_actions: int = 16, candidates: bool = True) -> None:
        if size != SIDE:
            raise ValueError(f"size must be {SIDE}, got {size!r}")
        check_whole(givens=(givens, SIDE, len(CELLS) - 1))
        check_whole(max_actions=(max_actions, len(CELLS) - givens, None))
        check_flag(candidates=candidates)
        self.size, self.givens, self.max_actions, self.candidates = size, givens, max_actions, candidates
        self.puzzle: tuple[int, ...] = ()
        self.solution: tuple[int, ...] = ()
        self.board: list[int] = []

    def _begin(self, state_seed: int | None) -> str:
        self._draw_puzzle(state_draws(self.np_random, state_seed))
        self.board = list(self.puzzle)
        return self._observe()

    def _act(self, action: str) -> tuple[str, float, bool]:
        row, column, digit = map(int, action.split(","))
        fault, reward = self._fault(row, column, digit), INVALID
        if not fault:
            cell = SIDE * (row - 1) + column - 1
            reward = 0.0 if self.board[cell] else RIGHT if digit == self.solution[cell] else WRONG
            self.board[cell] = digit
            self.success = tuple(self.board) == self.solution
            reward += SOLVED * self.success
        return self._observe(fault), reward, self.success

    def parse_action(self, text: str) -> str | None:
        """``1,2,3`` (row, column, digit) for that or ``place 3 at row 1 col 2``, in any case and spacing; else None.

        The form decides, with numbers of one or two digits; whether the move is valid is for ``step`` to say.
        """
        if match := _TRIPLE.fullmatch(text) or _PLACE.fullmatch(text):
            return "{row},{column},{digit}".format_map({name: int(found) for name, found in match.groupdict().items()})
        return None

    @property
    def state_key(self) -> str:
        """Givens and board; actions left are not part of it, so that a state met twice has one key."""
        return "/".join("".join(map(str, digits)).replace("0", ".") for digits in (self.puzzle, self.board))

    @property
    def instructions(self) -> str:
        """Task, symbols, actions and limits."""
        symbols = "[d] given digit, d placed digit, . empty cell"
        if self.candidates:
            symbols += ". Candidates: row,col: digits that the cell's row, column and box lack"
        return (
            f"You are solving a Sudoku of {SIDE}x{SIDE} cells with one solution. Fill the empty cells so that every row, "
            f"column and {BOX}x{BOX} box has each digit from 1 to {SIDE} once.\nSymbols: {symbols}.\n"
            f"Rows and columns go from 1, top left, to {SIDE}, bottom right.\n"
            "Actions: <row>,<col>,<digit>, or place <digit> at row <row> col <col>. A placed digit may be overwritten, "
            "a given may not. A digit that is already in the row, column or box is refused and costs an action.\n"
            f"You have {self.max_actions} actions."
        )

    def legal_digits(self, cell: int) -> list[int]:
        """Digits, in ascending order, that no other cell of its row, column and box has. ``cell`` is 0 to 15."""
        board, taken = self.board, 0
        for peer in _PEERS[cell]:
            taken |= 1 << board[peer]
        return list(_LEFT[taken])

    def _draw_puzzle(self, draws: np.random.Generator) -> None:
        grids = _grids()
        solution = grids[draws.integers(len(grids))]
        for _ in range(TRIES):
            given = draws.permutation(len(CELLS))[: self.givens]
            if (grids[:, given] == solution[given]).all(axis=1).sum() == 1:
                self.solution = tuple(solution.tolist())
                self.puzzle = tuple(self.solution[cell] if cell in given else 0 for cell in CELLS)
                return
        raise UserError(f"environments: no Sudoku with one solution found with givens {self.givens}")

    def _fault(self, row: int, column: int, digit: int) -> str:
        """Why a move is invalid; empty if it is not."""
        if not all(number in DIGITS for number in (row, column, digit)):
            return f"numbers go from 1 to {SIDE}"
        cell = SIDE * (row - 1) + column - 1
        if self.puzzle[cell]:
            return f"{row},{column} is given"
        return "" if digit in self.legal_digits(cell) else f"{digit} is in the row, column or box of {row},{column}"

    def _observe(self, fault: str = "") -> str:
        lines = [" ".join(row) for row in board(self.state_key)]
        if self.candidates:
            found = [(cell, self.legal_digits(cell)) for cell in CELLS if not self.board[cell]]
            found.sort(key=lambda candidates: len(candidates[1]))
            lines += ["candidates", *([_listed(*candidates) for candidates in found] or ["none"])]
        if fault:
            lines.append(f"invalid: {fault}")
        return "\n".join(lines)


def board(state_key: str) -> list[list[str]]:
    """The board of a state key: rows of cells, givens in brackets."""
    givens, digits = state_key.split("/")
    cells = [digit if given == "." else f"[{given}]" for given, digit in zip(givens, digits, strict=True)]
    return [cells[start : start + SIDE] for start in CELLS[::SIDE]]


def _listed(cell: int, digits: list[int]) -> str:
    return f"{_NAMES[cell]}: {' '.join(map(str, digits)) or 'none'}"


def _placing(cell: int, digit: int) -> str:
    """The shorter of the two forms, and the one in which candidates are listed."""
    return f"{_NAMES[cell]},{digit}"


_ROWS, _COLUMNS = divmod(np.arange(SIDE**2), SIDE)
_UNITS = np.stack([_ROWS, _COLUMNS, _ROWS // BOX * BOX + _COLUMNS // BOX])
"""(3, 16): the row, column and box of each cell."""
_PEERS = [np.flatnonzero((_UNITS[:, [c]] == _UNITS).any(0) & (np.array(CELLS) != c)).tolist() for c in CELLS]
"""The other cells of each cell's row, column and box."""
_LEFT = [[digit for digit in DIGITS if not taken >> digit & 1] for taken in range(2 ** (SIDE + 1))]
"""The digits that are not among those whose bits are set."""


@lru_cache(maxsize=1)
def _grids() -> NDArray[np.int64]:
    """(288, 16): every filled grid."""
    grids: list[tuple[int, ...]] = [()]
    for cell in CELLS:
        before = [peer for peer in _PEERS[cell] if peer < cell]
        grids = [(*grid, d) for grid in grids for d in DIGITS if all(grid[peer] != d for peer in before)]
    return np.array(grids)


class SudokuExpert(Expert):
    """Fills the cells in which least is possible, and describes the board in words that never name a move; a plan does."""

    def act(self, sudoku: Sudoku, draws: np.random.Generator) -> str:
        """A move towards the solution.

        Wrong digits go first, any of them: one is replaced by the right digit where that is legal, else by another one,
        to make way. Then the first of the empty cells with the fewest candidates is filled, which a policy can learn by
        copying where they are listed. Where wrong digits block everything, one is repeated.
        """
        board, solution = sudoku.board, sudoku.solution
        legal = [sudoku.legal_digits(cell) for cell in CELLS]
        wrong = [cell for cell in CELLS if board[cell] not in (0, solution[cell])]
        ready = [cell for cell in CELLS if not board[cell] and solution[cell] in legal[cell]]
        ready.sort(key=lambda cell: len(legal[cell]))
        choices = (
            [(cell, solution[cell]) for cell in wrong if solution[cell] in legal[cell]]
            or [(cell, digit) for cell in wrong for digit in legal[cell] if digit != board[cell]]
            or [(cell, solution[cell]) for cell in ready[:1]]
            or [(cell, board[cell]) for cell in wrong]
        )
        return _placing(*one_of(choices, draws))

    def random_action(self, sudoku: Sudoku, draws: np.random.Generator) -> str:
        """Any digit in an empty cell whose row, column and box lack it; where there is none, any digit in any cell.

        A demonstration's noise is then a mistake that a player could make; of all moves, most would be refused.
        """
        legal = [(cell, digit) for cell in CELLS if not sudoku.board[cell] for digit in sudoku.legal_digits(cell)]
        choices = legal or [(cell, digit) for cell in CELLS for digit in DIGITS]
        return _placing(*one_of(choices, draws))

    def plan(self, sudoku: Sudoku, action: str, draws: np.random.Generator) -> str:
        """The cell, what its row, column and box leave for it, and the digit."""
        row, column, digit = map(int, action.split(","))
        legal = sudoku.legal_digits(SIDE * (row - 1) + column - 1)
        return f"at {row} {column} fits {' '.join(map(str, legal)) or 'nothing'} so {digit}"

    def _facts(self, sudoku: Sudoku, draws: np.random.Generator) -> list[str]:
        pick = wording(draws)
        board = np.array(sudoku.board).reshape(SIDE, SIDE)
        empty = [cell for cell in CELLS if not sudoku.board[cell]]
        single = sum(len(sudoku.legal_digits(cell)) == 1 for cell in empty)
        digit = int(draws.integers(1, SIDE + 1))
        place = int(draws.integers(SIDE))
        line, name = ((board[place], "row"), (board[:, place], "column"))[int(draws.integers(2))]
        missing = " ".join(str(d) for d in DIGITS if d not in line) or "nothing"
        return [
            f"{('first', 'second', 'third', 'fourth')[place]} {name} {pick('lacks', 'needs', 'misses')} {missing}",
            f"{pick('cells to fill', 'still empty', 'empty cells')} {len(empty)}",
            f"{pick('cells with one candidate', 'only one fits in', 'sure cells')} {single}",
            f"{pick('the board has', 'on the board')} {int((board == digit).sum())} {pick('times', 'of digit')} {digit}",
            pick("let me think", "careful", "look at the boxes", "hmm", "check again", "so"),
        ]


expert = SudokuExpert
