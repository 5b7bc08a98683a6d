"""Sokoban: push every box onto a target, described in text.

Rooms are drawn by reverse play: boxes start on their targets and are pulled away by random moves, so a solution exists;
a search then finds the shortest one, and the room is kept if its length is allowed. The grid is drawn with the published
symbols; coordinates (row, column), zero-indexed, stand beside it.

A cell is a number, row * size + column. The outermost cells are walls, so that no step leaves the room.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from heapq import heappop, heappush
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.environments.draws import one_of, wording
from pipeline.environments.episodic import Episodic, Expert, check_flag, check_whole
from pipeline.environments.grids import check_grid, distances
from pipeline.workspace.errors import UserError

MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
"""Action names with their step in (row, column)."""

NODES = 20_000
"""States that the expert's search may expand: at most about half a second. One box in 10x10 cells has 4032 states."""

OPENING_NODES = NODES // 4
"""A drawn room is solved within these, which leaves the expert a reserve for states that it would not have chosen."""

Boxes = frozenset[int]
State = tuple[int, Boxes]
"""What moves: player and boxes."""
Kind = tuple[int, int, float, int, int]
"""Settings that a room is drawn by: size, boxes, inner_walls, least_moves, max_actions."""


class Room(NamedTuple):
    """What stays: side length, cells that are walls (border included), cells that are targets."""

    size: int
    walls: frozenset[int]
    targets: frozenset[int]

    def after(self, state: State, step: int) -> State:
        """The state after the player's step by ``step`` cells; the same one if a wall or a second box is in the way."""
        player, boxes = state
        ahead = player + step
        if ahead in self.walls:
            return state
        if ahead not in boxes:
            return ahead, boxes
        beyond = ahead + step
        return state if beyond in self.walls or beyond in boxes else (ahead, boxes - {ahead} | {beyond})


class Sokoban(Episodic):
    """Push all boxes onto targets. A blocked move changes nothing and costs a step.

    Args:
        size: side of the square room, border walls included, 5 to 10.
        boxes: boxes and targets, 1 to 3; no box starts on a target.
        inner_walls: chance that a cell inside the border is a wall, 0 to 0.5; floor cut off by them is walled up.
        least_moves: least length of a room's shortest solution, 1 to ``max_actions``.
        max_actions: moves after which the episode is cut off, 1 to 200; every room can be solved within them.
        grid: draw the grid in every observation, in the first one, or never.
        coordinates: give coordinates in every observation; required if the grid is never drawn.
        step_reward: reward of every move, at most 0.
        on_target: added when a push brings a box onto a target (not from another target).
        off_target: added when a push takes a box off the targets; at most ``-on_target``, so that undoing never pays.
        solved: added when all boxes are on targets, which ends the episode.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        size: int = 6,
        boxes: int = 1,
        inner_walls: float = 0.1,
        least_moves: int = 1,
        max_actions: int = 10,
        grid: str = "always",
        coordinates: bool = True,
        step_reward: float = -0.1,
        on_target: float = 1.0,
        off_target: float = -1.0,
        solved: float = 10.0,
    ) -> None:
        check_whole(size=(size, 5, 10), boxes=(boxes, 1, 3), max_actions=(max_actions, 1, 200))
        check_whole(least_moves=(least_moves, 1, max_actions))
        if not 0.0 <= inner_walls <= 0.5:
            raise ValueError(f"inner_walls must be 0 to 0.5, got {inner_walls}")
        check_grid(grid)
        check_flag(coordinates=coordinates)
        if grid == "never" and not coordinates:
            raise ValueError("coordinates must be true if grid is never, got False")
        for name, reward, highest in (
            ("step_reward", step_reward, 0.0),
            ("on_target", on_target, math.inf),
            ("off_target", off_target, 0.0 - on_target),
            ("solved", solved, math.inf),
        ):
            if not math.isfinite(reward) or reward > highest:
                raise ValueError(f"{name} must be finite and at most {highest:g}, got {reward}")
        self.size, self.count, self.inner_walls = size, boxes, inner_walls
        self.least_moves, self.max_actions = least_moves, max_actions
        self.grid, self.coordinates = grid, coordinates
        self.step_reward, self.on_target, self.off_target, self.solved = step_reward, on_target, off_target, solved
        self.steps = _steps(size)
        self.room, self.player = Room(size, frozenset(), frozenset()), 0
        self.boxes: Boxes = frozenset()

    def _begin(self, state_seed: int | None) -> str:
        kind = (self.size, self.count, self.inner_walls, self.least_moves, self.max_actions)
        drawn = _draw_room(kind, self.np_random) if state_seed is None else _room_of(kind, state_seed)
        self.room, (self.player, self.boxes) = drawn
        return self._observe()

    def _act(self, action: str) -> tuple[str, float, bool]:
        """Move, pushing a box that is in the way."""
        before = len(self.boxes & self.room.targets)
        self.player, self.boxes = self.room.after((self.player, self.boxes), self.steps[action])
        gained = len(self.boxes & self.room.targets) - before
        self.success = self.boxes == self.room.targets
        reward = self.step_reward + {1: self.on_target, 0: 0.0, -1: self.off_target}[gained]
        reward += self.solved if self.success else 0.0
        return self._observe(), float(reward), self.success

    def parse_action(self, text: str) -> str | None:
        """``Up``, ``Down``, ``Left`` or ``Right`` in any case, surrounded by any space; else None."""
        name = text.strip().capitalize()
        return name if name in MOVES else None

    @property
    def state_key(self) -> str:
        """The grid, which shows the whole state; actions left are not part of it."""
        symbols, targets = list(_still(self.room)[0]), self.room.targets
        for box in self.boxes:
            symbols[box + box // self.size] = "√" if box in targets else "X"
        symbols[self.player + self.player // self.size] = "S" if self.player in targets else "P"
        return "".join(symbols)

    @property
    def instructions(self) -> str:
        """Task, symbols, actions and limits."""
        last = self.size - 1
        pieces = "1 box and 1 target" if self.count == 1 else f"{self.count} boxes and {self.count} targets"
        lines = [
            f"You are solving a Sokoban room of {self.size}x{self.size} cells with {pieces}. Push every box onto a "
            "target. Walking into a box pushes it, unless a wall or another box is behind it; boxes cannot be pulled.",
            "Symbols: # wall, _ floor, O target, √ box on target, X box, P player, S player on target.",
            f"Coordinates are (row, column) from (0, 0), top left, to ({last}, {last}), bottom right; "
            "walls on the border are not listed.",
            f"Actions: {', '.join(MOVES)}. You have {self.max_actions} actions.",
        ]
        if self.grid == "never":
            del lines[1]
        if not self.coordinates:
            del lines[2]
        return "\n".join(lines)

    def _observe(self) -> str:
        shown = self.grid == "always" or (self.grid == "first" and self.actions_left == self.max_actions)
        lines = [" ".join(row) for row in board(self.state_key)] if shown else []
        if self.coordinates:
            player, boxes = _places(self.size, [self.player]), _places(self.size, self.boxes)
            lines.append(f"player {player} boxes {boxes} {_still(self.room)[1]}")
        return "\n".join(lines)


def board(state_key: str) -> list[list[str]]:
    """The room of a state key: rows of cells."""
    return [list(row) for row in state_key.split("/")]


def solve(room: Room, state: State, nodes: int = NODES, limit: int | None = None) -> dict[State, str] | None:
    """A shortest solution, by A*: each state on the way with the move to make there, in order; empty if solved.

    It is None if no solution has at most ``limit`` moves, or if none was found when ``nodes`` states were expanded.

    The estimate of the moves to go is admissible and consistent: pushes that the boxes need, on an empty floor with the
    best assignment to targets, and the player's walk to the nearest box. It is infinite, and the state is left out,
    where a box cannot be pushed to any target (corners above all). Among equal estimates the newest state goes first.
    """
    steps = _steps(room.size)
    pushes = [_pushes(room, target) for target in room.targets]
    needed: dict[Boxes, float] = {}

    def to_go(player: int, boxes: Boxes) -> float:
        if boxes not in needed:
            needed[boxes] = min(
                sum(p.get(b, math.inf) for p, b in zip(pushes, order, strict=True)) for order in permutations(boxes)
            )
        row, column = divmod(player, room.size)
        walk = min(abs(row - b // room.size) + abs(column - b % room.size) for b in boxes) - 1
        return needed[boxes] and needed[boxes] + walk

    most = math.inf if limit is None else limit
    moves, came = {state: 0}, dict[State, tuple[State, str]]()
    order, closed = 0, set[State]()
    heap = [(to_go(*state), order, state)]
    while heap and len(closed) < nodes:
        estimate, _, here = heappop(heap)
        if here[1] == room.targets:
            path = []
            while here != state:
                here, name = came[here]
                path.append((here, name))
            return dict(reversed(path))
        if here in closed or estimate > most:
            continue
        closed.add(here)
        for name, step in steps.items():
            there = room.after(here, step)
            if moves[here] + 1 < moves.get(there, math.inf):
                estimate = moves[here] + 1 + to_go(*there)
                if estimate <= most and estimate < math.inf:
                    moves[there], came[there], order = moves[here] + 1, (here, name), order - 1
                    heappush(heap, (estimate, order, there))
    return None


@lru_cache(maxsize=1024)
def _room_of(kind: Kind, state_seed: int) -> tuple[Room, State]:
    """The room of a state, which all members of a group start in."""
    return _draw_room(kind, np.random.default_rng(state_seed))


def _draw_room(kind: Kind, draws: np.random.Generator) -> tuple[Room, State]:
    """A room that the settings allow, and where player and boxes start.

    Raises:
        UserError: none turned up.
    """
    size, count, inner_walls, least_moves, max_actions = kind
    steps, inside = list(_steps(size).values()), _inside(size)
    for _ in range(1_000):
        free = set(inside[draws.random(len(inside)) >= inner_walls].tolist())
        middle = one_of(inside.tolist(), draws)
        floor = _connected(free, middle, steps)
        if middle not in free or len(floor) <= 2 * count:
            continue
        *cells, player = draws.choice(sorted(floor), size=count + 1, replace=False).tolist()
        room = Room(size, frozenset(range(size**2)) - floor, frozenset(cells))
        boxes = room.targets
        for direction in draws.integers(4, size=10 * max_actions).tolist():
            behind, ahead = player - steps[direction], player + steps[direction]
            if ahead in floor and ahead not in boxes:
                boxes = boxes - {behind} | {player} if behind in boxes else boxes
                player = ahead
        if boxes.isdisjoint(room.targets):
            plan = solve(room, (player, boxes), OPENING_NODES, max_actions)
            if plan is not None and len(plan) >= least_moves:
                return room, (player, boxes)
    raise UserError(
        f"environments: no room found with size {size}, boxes {count}, inner_walls {inner_walls:g}, "
        f"least_moves {least_moves} and max_actions {max_actions}"
    )


@lru_cache(maxsize=4096)
def _still(room: Room) -> tuple[str, str]:
    """What stays as it is in a room: its grid, rows with / between, and the coordinates of targets and inner walls."""
    symbols = np.full(room.size**2, "_")
    symbols[list(room.walls)] = "#"
    symbols[list(room.targets)] = "O"
    targets, walls = (
        _places(room.size, cells) for cells in (room.targets, room.walls.intersection(_inside(room.size)))
    )
    rows = "/".join("".join(row) for row in symbols.reshape(room.size, room.size))
    return rows, f"targets {targets} walls {walls or 'none'}"


def _places(size: int, cells: Iterable[int]) -> str:
    """Row and column of each cell, in order."""
    return " ".join([f"{cell // size} {cell % size}" for cell in sorted(cells)])


def _pushes(room: Room, target: int) -> dict[int, int]:
    """Least number of pushes that bring a lone box to the target, from each cell where that is possible."""
    steps = list(_steps(room.size).values())
    return distances(target, lambda cell: [cell - s for s in steps if room.walls.isdisjoint((cell - s, cell - 2 * s))])


def _connected(cells: set[int], start: int, steps: list[int]) -> frozenset[int]:
    """The start and the cells that can be reached from it."""
    return frozenset(distances(start, lambda cell: cells.intersection([cell + step for step in steps])))


def _steps(size: int) -> dict[str, int]:
    return {name: row * size + column for name, (row, column) in MOVES.items()}


def _inside(size: int) -> NDArray[np.int64]:
    return np.arange(size**2).reshape(size, size)[1:-1, 1:-1].ravel()


class SokobanExpert(Expert):
    """Follows a shortest solution, and describes the state in words that never name the move; a plan does."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._plan: dict[State, str] = {}

    def act(self, sokoban: Sokoban, draws: np.random.Generator) -> str:
        """The next move of a shortest solution, which is kept as long as the states on it are met.

        Where no solution exists, or ``NODES`` states were not enough to find it, any move.
        """
        return self._solution(sokoban).get((sokoban.player, sokoban.boxes)) or self.random_action(sokoban, draws)

    def random_action(self, sokoban: Sokoban, draws: np.random.Generator) -> str:
        """Any move."""
        return one_of(list(MOVES), draws)

    def plan(self, sokoban: Sokoban, action: str, draws: np.random.Generator) -> str:
        """The next push of a shortest solution, the cell to make it from, and the move."""
        ahead, push = False, "no push"
        for state, move in self._solution(sokoban).items():
            ahead = ahead or state == (sokoban.player, sokoban.boxes)
            if ahead and sokoban.room.after(state, sokoban.steps[move])[1] != state[1]:
                push = f"push {move.lower()} from {_places(sokoban.size, [state[0]])}"
                break
        return f"{push} so {action}"

    def _solution(self, sokoban: Sokoban) -> dict[State, str]:
        """See ``act``; empty where there is none."""
        state = (sokoban.player, sokoban.boxes)
        if sokoban.room != self._room or state not in self._plan:
            self._room, self._plan = sokoban.room, solve(sokoban.room, state) or {}
        return self._plan

    def _facts(self, sokoban: Sokoban, draws: np.random.Generator) -> list[str]:
        pick = wording(draws)
        boxes, targets = sokoban.boxes, sokoban.room.targets
        box, target = (one_of(sorted(cells), draws) for cells in (boxes - targets or boxes, targets - boxes or targets))
        (row, column), (target_row, target_column) = divmod(box, sokoban.size), divmod(target, sokoban.size)
        return [
            f"{pick('I am at', 'player at', 'now at')} {_places(sokoban.size, [sokoban.player])}",
            f"{pick('box at', 'the box is at', 'a box at')} {_places(sokoban.size, [box])}",
            f"{pick('target at', 'the target is at', 'goal at')} {_places(sokoban.size, [target])}",
            f"{pick('rows apart', 'row distance', 'rows to push')} {abs(target_row - row)}",
            f"{pick('columns apart', 'column distance', 'columns to push')} {abs(target_column - column)}",
            f"{pick('boxes done', 'on target', 'boxes home')} {len(boxes & targets)}",
            pick("let me think", "careful", "stay out of corners", "hmm", "look again", "so"),
        ]


expert = SokobanExpert
