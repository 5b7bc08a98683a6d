"""FrozenLake with coordinates: gymnasium's dynamics, described in text.

Every instance has a random start and goal, and holes that leave a path between them. The grid is drawn with the
published symbols; coordinates (row, column), zero-indexed, stand beside it ("CoordFrozenLake").
"""

from collections.abc import Iterator
from functools import lru_cache
from math import inf

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from pipeline.environments.draws import one_of, state_draws, wording
from pipeline.environments.episodic import Episodic, Expert, check_whole
from pipeline.environments.grids import check_grid, distances
from pipeline.workspace.errors import UserError

MOVES = {"Left": (0, -1), "Down": (1, 0), "Right": (0, 1), "Up": (-1, 0)}
"""Action names in gymnasium's order, with the step in (row, column) that they intend."""

Cell = tuple[int, int]


class FrozenLake(Episodic):
    """Reach the goal without falling into a hole. Reward 1 at the goal, else 0.

    Args:
        size: side of the square lake, 2 to 10.
        frozen: chance that a cell other than start and goal is ice rather than a hole.
        success_rate: chance that a move goes as intended; the rest is shared by the two sides. 1 is deterministic.
        least_distance: least number of moves from start to goal.
        max_actions: moves after which the episode is cut off; every start can reach its goal within them.
        grid: draw the grid in every observation, in the first one, or never; coordinates are always given.
    """

    def __init__(
        self,
        size: int = 4,
        frozen: float = 0.9,
        success_rate: float = 1.0,
        least_distance: int = 1,
        max_actions: int = 10,
        grid: str = "always",
    ) -> None:
        if not 0.0 < frozen <= 1.0:
            raise ValueError(f"frozen must be in (0, 1], got {frozen}")
        if not 1 / 3 <= success_rate <= 1.0:
            raise ValueError(f"success_rate must be in [1/3, 1], got {success_rate}")
        check_whole(size=(size, 2, 10), max_actions=(max_actions, 1, None))
        check_whole(least_distance=(least_distance, 1, min(max_actions, 2 * (size - 1))))
        check_grid(grid)
        self.size, self.frozen, self.success_rate = size, frozen, success_rate
        self.least_distance, self.max_actions, self.grid = least_distance, max_actions, grid
        self.player: Cell = (0, 0)

    def _begin(self, state_seed: int | None) -> str:
        self._draw_lake(state_draws(self.np_random, state_seed))
        self.player = self.start
        return self._observe()

    def _act(self, action: str) -> tuple[str, float, bool]:
        """Move, as gymnasium's table of transitions says."""
        outcomes = _transitions(self._lake, self.success_rate)[self.player[0] * self.size + self.player[1]][action]
        chance = self.np_random.random() if len(outcomes) > 1 else 0.0
        for probability, cell, reward, terminated in outcomes:  # noqa: B007
            chance -= probability
            if chance < 0:
                break
        self.player = divmod(int(cell), self.size)
        self.success = self.player == self.goal
        return self._observe(), float(reward), bool(terminated)

    def parse_action(self, text: str) -> str | None:
        """``Left``, ``Down``, ``Right`` or ``Up`` in any case, surrounded by any space; else None."""
        name = text.strip().capitalize()
        return name if name in MOVES else None

    @property
    def state_key(self) -> str:
        """Lake and player; actions left are not part of it, so that a state met twice has one key."""
        return f"{self._lake}@{self.player[0]},{self.player[1]}"

    @property
    def instructions(self) -> str:
        """Task, symbols, actions and limits."""
        last = self.size - 1
        slip = (
            "The ice is not slippery."
            if self.success_rate == 1
            else f"The ice is slippery: a move goes as intended with probability {self.success_rate:g}, else to a side."
        )
        return (
            f"You are walking on a frozen lake of {self.size}x{self.size} cells. Reach the goal without falling into a "
            f"hole. {slip}\nSymbols: P player, _ frozen, O hole, G goal, X player in a hole, √ player on the goal.\n"
            f"Coordinates are (row, column) from (0, 0), top left, to ({last}, {last}), bottom right.\n"
            f"Actions: {', '.join(MOVES)}. You have {self.max_actions} actions."
        )

    def distances(self) -> dict[Cell, int]:
        """Least number of intended moves from each ice cell that can reach the goal."""
        return distances(self.goal, self._ice_around)

    def _ice_around(self, cell: Cell) -> Iterator[Cell]:
        for step_row, step_column in MOVES.values():
            row, column = cell[0] + step_row, cell[1] + step_column
            if 0 <= row < self.size and 0 <= column < self.size and (row, column) not in self.holes:
                yield row, column

    def _draw_lake(self, draws: np.random.Generator) -> None:
        for _ in range(10_000):
            ends = draws.choice(self.size**2, size=2, replace=False)
            lake = np.where(draws.random(self.size**2) < self.frozen, "F", "H")
            lake[ends] = ["S", "G"]
            self.start, self.goal = (divmod(cell, self.size) for cell in ends.tolist())
            self.holes = frozenset(divmod(cell, self.size) for cell in np.flatnonzero(lake == "H").tolist())
            if self.least_distance <= self.distances().get(self.start, 0) <= self.max_actions:
                self._lake = "/".join("".join(row) for row in lake.reshape(self.size, self.size))
                return
        raise UserError(
            f"environments: no lake found with size {self.size}, frozen {self.frozen:g}, "
            f"least_distance {self.least_distance} and max_actions {self.max_actions}"
        )

    def _observe(self) -> str:
        shown = self.grid == "always" or (self.grid == "first" and self.actions_left == self.max_actions)
        rows = [" ".join(row) for row in board(self.state_key)] if shown else []
        holes = " ".join(f"{row} {column}" for row, column in sorted(self.holes)) or "none"
        player, goal = (f"{row} {column}" for row, column in (self.player, self.goal))
        return "\n".join([*rows, f"player {player} goal {goal} holes {holes}"])


def board(state_key: str) -> list[list[str]]:
    """The lake of a state key, in the symbols of the observation: rows of cells."""
    lake, place = state_key.split("@")
    rows = [[{"H": "O", "G": "G"}.get(cell, "_") for cell in row] for row in lake.split("/")]
    row, column = map(int, place.split(","))
    rows[row][column] = {"O": "X", "G": "√"}.get(rows[row][column], "P")
    return rows


@lru_cache(maxsize=1024)
def _transitions(lake: str, success_rate: float) -> list[dict[str, list[tuple[float, int, float, bool]]]]:
    """Gymnasium's transitions: for each cell and action, (probability, next cell, reward, whether it ends there)."""
    table = FrozenLakeEnv(desc=lake.split("/"), is_slippery=success_rate < 1, success_rate=success_rate).P
    return [dict(zip(MOVES, outcomes.values(), strict=True)) for outcomes in table.values()]


def _towards(lake: FrozenLake, cell: Cell, move: str) -> Cell:
    """Where a move leads to if it goes as intended: the same cell at the lake's side."""
    row, column = (min(max(at + step, 0), lake.size - 1) for at, step in zip(cell, MOVES[move], strict=True))
    return row, column


class FrozenLakeExpert(Expert):
    """Walks a shortest path, and describes the state in words that never name the move; a plan does."""

    def act(self, lake: FrozenLake, draws: np.random.Generator) -> str:
        """A move on a shortest path; ties are broken by ``draws``.

        On slippery ice the move is still the one a shortest path intends.
        """
        distance, (row, column) = lake.distances(), lake.player
        left = {name: distance.get((row + dr, column + dc), inf) for name, (dr, dc) in MOVES.items()}
        return one_of([name for name, moves in left.items() if moves == min(left.values())], draws)

    def random_action(self, lake: FrozenLake, draws: np.random.Generator) -> str:
        """Any move."""
        return one_of(list(MOVES), draws)

    def plan(self, lake: FrozenLake, action: str, draws: np.random.Generator) -> str:
        """A way to the goal that begins with the action, as far as the ice carries; shortest behind it."""
        distance, cell, way = lake.distances(), _towards(lake, lake.player, action), [action]
        while distance.get(cell, 0) > 0:
            way.append(min(MOVES, key=lambda name: distance.get(_towards(lake, cell, name), inf)))
            cell = _towards(lake, cell, way[-1])
        return f"way {' '.join(way)}"

    def _facts(self, lake: FrozenLake, draws: np.random.Generator) -> list[str]:
        pick = wording(draws)
        (row, column), (goal_row, goal_column) = lake.player, lake.goal
        facts = [
            f"{pick('I am at', 'player at', 'now at')} {row} {column}",
            f"{pick('goal at', 'the goal is at', 'target at')} {goal_row} {goal_column}",
            f"{pick('rows apart', 'row distance', 'rows to go')} {abs(goal_row - row)}",
            f"{pick('columns apart', 'column distance', 'columns to go')} {abs(goal_column - column)}",
            pick("let me think", "careful", "stay on the ice", "hmm", "look again", "so"),
        ]
        if lake.holes:
            hole = one_of(sorted(lake.holes), draws)
            facts.append(f"{pick('hole at', 'a hole at', 'avoid')} {hole[0]} {hole[1]}")
        return facts


expert = FrozenLakeExpert
