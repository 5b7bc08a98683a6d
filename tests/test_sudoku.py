"""Sudoku: puzzles, moves, and rewards worked by hand."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.environments import initial_states, sudoku
from pipeline.environments.splits import SPLITS
from pipeline.environments.sudoku import Sudoku, SudokuExpert
from pipeline.workspace.errors import UserError
from tests.puzzles import FOUR, SEVEN, SOLUTION, anywhere, given, share_a_unit, solutions, started

# --------------------------------------------------------------------------------------------------- rewards by hand

EPISODES = {
    "seven right digits; the last one solves": (
        SEVEN,
        16,
        [("1,3,3", 1), ("2,1,3", 1), ("2,4,2", 1), ("3,1,2", 1), ("3,4,3", 1), ("4,2,3", 1), ("4,3,2", 11)],
        "solved",
    ),
    "four right digits with the last action": (
        FOUR,
        4,
        [("place 1 at row 4 col 4", 1), ("3,2,1", 1), ("place 1 at row 1 col 1", 1), ("2,3,1", 11)],
        "solved",
    ),
    "a wrong digit is overwritten by the right one, for nothing": (
        SEVEN,
        16,
        [
            *[("2,4,3", 0.5), ("2,4,2", 0)],
            *[("1,3,3", 1), ("2,1,3", 1), ("3,1,2", 1), ("3,4,3", 1), ("4,2,3", 1), ("4,3,2", 11)],
        ],
        "solved",
    ),
    "one cell overwritten twenty times": (
        SEVEN,
        20,
        [("2,4,3", 0.5), ("2,4,2", 0), *[("2,4,3", 0), ("2,4,2", 0)] * 9],
        "cut off",
    ),
    "a given, a digit that its row has, a row and a column that do not exist": (
        FOUR,
        4,
        [("1,2,1", -0.1), ("1,1,2", -0.1), ("5,1,1", -0.1), ("1,0,1", -0.1)],
        "cut off",
    ),
    "a right digit made wrong blocks box, row and column until it is right again": (
        SEVEN,
        7,
        [("2,4,2", 1), ("2,4,3", 0), ("1,3,3", -0.1), ("2,1,3", -0.1), ("3,4,3", -0.1), ("2,4,2", 0), ("1,3,3", 1)],
        "cut off",
    ),
    "solved after a detour": (
        SEVEN,
        16,
        [
            *[("3,1,3", 0.5), ("1,3,3", 1), ("2,1,3", -0.1), ("2,4,2", 1), ("3,4,3", -0.1), ("4,2,3", -0.1)],
            *[("4,3,2", 1), ("3,1,2", 0), ("2,1,3", 1), ("3,4,3", 1), ("4,2,3", 11)],
        ],
        "solved",
    ),
    "a right digit repeated": (
        FOUR,
        5,
        [("1,1,1", 1), ("1,1,1", 0), ("2,3,1", 1), ("3,2,1", 1), ("4,4,1", 11)],
        "solved",
    ),
    "one invalid move too many": (
        SEVEN,
        7,
        [("1,3,9", -0.1), ("1,3,3", 1), ("2,1,3", 1), ("2,4,2", 1), ("3,1,2", 1), ("3,4,3", 1), ("4,2,3", 1)],
        "cut off",
    ),
    "two wrong digits in each other's way": (
        SEVEN,
        9,
        [
            *[("2,4,3", 0.5), ("3,4,2", 0.5), ("2,4,2", -0.1), ("3,4,3", -0.1), ("1,3,3", -0.1), ("2,1,3", -0.1)],
            *[("3,1,2", -0.1), ("4,3,2", -0.1), ("4,2,3", 1)],
        ],
        "cut off",
    ),
}


@pytest.mark.parametrize(("puzzle", "max_actions", "moves", "end"), EPISODES.values(), ids=EPISODES.keys())
def test_every_reward_of_an_episode(
    puzzle: tuple[int, ...], max_actions: int, moves: list[tuple[str, float]], end: str
) -> None:
    environment = given(puzzle, max_actions)
    for number, (move, expected) in enumerate(moves, start=1):
        action = environment.parse_action(move)
        assert action is not None
        before = environment.state_key
        observation, reward, terminated, truncated, _ = environment.step(action)
        assert reward == pytest.approx(expected), move
        assert (expected == -0.1) == ("invalid: " in observation)
        if expected == -0.1:
            assert environment.state_key == before
        last = number == len(moves)
        assert (terminated, truncated) == (last and end == "solved", last and end == "cut off")
        assert environment.done == last
        assert environment.success == terminated
        assert environment.actions_left == max_actions - number
    with pytest.raises(RuntimeError, match="reset"):
        environment.step("place 1 at row 1 col 1")


def test_the_puzzles_worked_by_hand_have_that_one_solution() -> None:
    for puzzle in (SEVEN, FOUR, SOLUTION):
        assert solutions(list(puzzle)) == 1
        assert all(digit in (0, right) for digit, right in zip(puzzle, SOLUTION, strict=True))


def test_an_invalid_move_says_why() -> None:
    environment = given(FOUR)
    for move, why in {
        "1,2,1": "1,2 is given",
        "1,1,2": "2 is in the row, column or box of 1,1",
        "1,1,5": "numbers go from 1 to 4",
        "99,1,1": "numbers go from 1 to 4",
    }.items():
        assert environment.step(move)[0].endswith(f"\ninvalid: {why}")
    assert "invalid" not in environment.step("1,1,1")[0]


def test_a_board_met_again_earned_nothing_in_between() -> None:
    met: Counter[str] = Counter()
    for state in range(60):
        environment, draws, earned = started(state, givens=5, max_actions=80), np.random.default_rng(state), 0.0
        first = {environment.state_key: 0.0}
        while not environment.done:
            filled = [cell for cell in range(16) if environment.board[cell] and not environment.puzzle[cell]]
            cell = filled[int(draws.integers(len(filled)))] if filled and draws.random() < 0.5 else None
            action = anywhere(draws)
            if cell is not None:  # overwriting is rare among random moves
                action = f"{cell // 4 + 1},{cell % 4 + 1},{int(draws.integers(1, 5))}"
            before = environment.state_key
            _, reward, *_ = environment.step(action)
            earned += reward
            key = environment.state_key
            assert earned <= first.setdefault(key, earned) + 1e-9
            met["overwritten"] += reward == 0 and key != before
            met["again"] += key in first and key != before and first[key] != earned
    assert min(met["overwritten"], met["again"]) > 20


def test_paid_at_most_one_per_cell_and_over_in_max_actions_however_it_is_played() -> None:
    for state in range(100):
        environment, draws, rewards = started(state, givens=6, max_actions=40), np.random.default_rng(state), []
        while not environment.done:
            rewards.append(environment.step(anywhere(draws))[1])
        assert len(rewards) <= 40
        assert sum(reward > 0 for reward in rewards) <= 10
        assert sum(rewards) <= 10 + 10 * environment.success


# -------------------------------------------------------------------------------------------------------- the puzzles


@pytest.mark.parametrize("givens", [4, 6, 8, 11, 15])
def test_puzzles_have_one_solution_and_the_expert_finds_it(givens: int) -> None:
    """1,000 puzzles over all parameters; without a wrong move the expert needs one action per empty cell."""
    environment, draws = Sudoku(givens=givens, max_actions=16 - givens), np.random.default_rng(givens)
    for state in range(200):
        environment.reset(seed=0, options={"state_seed": state})
        assert sum(digit != 0 for digit in environment.puzzle) == givens
        assert solutions(list(environment.puzzle)) == 1
        total = 0.0
        while not environment.done:
            action = SudokuExpert().act(environment, draws)
            assert environment.parse_action(action) == action
            total += environment.step(action)[1]
        assert environment.success
        assert total == 16 - givens + 10
        assert all(digit in (0, right) for digit, right in zip(environment.puzzle, environment.board, strict=True))


def test_there_are_288_grids() -> None:
    """A known number; brute force completes an empty board in as many ways."""
    assert len({tuple(grid) for grid in sudoku._grids().tolist()}) == solutions([0] * 16) == 288


def test_no_puzzle_found_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sudoku, "TRIES", 1)
    with pytest.raises(UserError, match=r"^environments: no Sudoku with one solution found with givens 4$"):
        started(0, givens=4)


def test_puzzles_vary_and_every_split_has_its_own() -> None:
    environment, keys = Sudoku(), {}
    for split in SPLITS:
        seeds = initial_states(environment, split, 100, np.random.default_rng(0), distinct=True)
        keys[split] = {started(seed).state_key for seed in seeds}
    assert len(set.union(*keys.values())) == 400
    assert len({started(state).solution for state in range(1000)}) > 250
    assert len({started(state, givens=15).state_key for state in range(1000)}) > 800


@pytest.mark.parametrize("givens", [4, 8])
def test_a_reset_takes_less_than_five_milliseconds(givens: int) -> None:
    environment = Sudoku(givens=givens, max_actions=16)
    environment.reset(seed=0)
    before = time.process_time()
    for state in range(200):
        environment.reset(seed=0, options={"state_seed": state})
    assert (time.process_time() - before) / 200 < 5e-3


# --------------------------------------------------------------------------------------------------------------- text


def test_every_number_shown_matches_the_board() -> None:
    for state in range(30):
        environment, draws = started(state, givens=6), np.random.default_rng(state)
        observation = environment._observe()
        while True:
            board, candidates = observation.split("\ninvalid")[0].split("\ncandidates\n")
            rows = board.split("\n")
            shown = [symbol for row in rows for symbol in row.split(" ")]
            assert [len(row.split(" ")) for row in rows] == [4] * 4
            for cell, symbol in enumerate(shown):
                digit = environment.board[cell]
                assert symbol == (f"[{digit}]" if environment.puzzle[cell] else str(digit) if digit else ".")
            assert read_candidates(candidates) == {
                (cell // 4 + 1, cell % 4 + 1): [
                    digit
                    for digit in (1, 2, 3, 4)
                    if all(environment.board[other] != digit for other in range(16) if share_a_unit(cell, other))
                ]
                for cell in range(16)
                if not environment.board[cell]
            }
            if environment.done:
                break
            move = anywhere(draws)
            if draws.random() < 0.7:
                move = SudokuExpert().act(environment, draws)
            observation = environment.step(move)[0]
            assert len(observation) <= (environment.observation_space.max_length or 0)


def read_candidates(text: str) -> dict[tuple[int, int], list[int]]:
    found = {}
    for line in [] if text == "none" else text.split("\n"):
        match = re.fullmatch(r"([1-4]),([1-4]): (none|[1-4]( [1-4])*)", line)
        assert match is not None
        found[int(match[1]), int(match[2])] = [] if match[3] == "none" else list(map(int, match[3].split()))
    assert list(map(len, found.values())) == sorted(map(len, found.values()))
    return found


def test_candidates_are_listed_only_when_asked_for() -> None:
    drawn = "[1] [2] . [4]\n. [4] [1] .\n. [1] [4] .\n[4] . . [1]"
    listed = "\ncandidates\n1,3: 3\n2,1: 3\n4,2: 3\n2,4: 2 3\n3,1: 2 3\n3,4: 2 3\n4,3: 2 3"
    for candidates in (False, True):
        environment = given(SEVEN, candidates=candidates)
        assert environment._observe() == drawn + listed * candidates
        assert ("Candidates" in environment.instructions) == candidates
        assert "\n. [4] [1] 3\n" in environment.step("2,4,3")[0]


def test_the_instructions_have_the_instances_numbers() -> None:
    text = started(0, givens=7, max_actions=23).instructions
    assert "4x4 cells" in text
    assert "2x2 box has each digit from 1 to 4" in text
    assert text.endswith("You have 23 actions.")
    assert set(re.findall(r"\d+", text)) == {"4", "2", "1", "23"}


@pytest.mark.parametrize(
    "text",
    [
        *["place 3 at row 1 col 2", " Place  3 AT row 1 COL 2\n", "PLACE 03 at row 01 col 2", "place3at row1 col2"],
        *["1,2,3", " 1 , 2 ,3 ", "1,2,03"],
    ],
)
def test_an_action_in_any_case_and_spacing_has_one_form(text: str) -> None:
    assert Sudoku().parse_action(text) == "1,2,3"


@pytest.mark.parametrize(
    "text",
    [
        *["", "1,2", "1,2,3,4", "1 2 3", "-1,2,3", "1,2,3.0", "1,2,a", "１,2,3", "123,1,1", "1,2,3 1,2,3", "(1,2,3)"],
        *[
            "place 3",
            "place 3 at col 2 row 1",
            "place -3 at row 1 col 2",
            "I place 3 at row 1 col 2",
            "3 at row 1 col 2",
        ],
    ],
)
def test_anything_else_is_no_action(text: str) -> None:
    environment = started(0)
    assert environment.parse_action(text) is None
    with pytest.raises(ValueError, match="action must be like"):
        environment.step(text)
    assert environment.actions_left == environment.max_actions


def test_numbers_outside_the_board_are_an_action_but_an_invalid_move() -> None:
    environment = started(0)
    for text in ("0,1,1", "1,5,1", "1,1,12"):
        action = environment.parse_action(text)
        assert action is not None
        assert environment.parse_action(action) == action
        assert environment.step(action)[1] == -0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 9}, "size must be 4, got 9"),
        ({"givens": 3}, "givens must be a whole number from 4 to 15, got 3"),
        ({"givens": 16}, "givens must be a whole number from 4 to 15, got 16"),
        ({"givens": 8.5}, "givens must be a whole number from 4 to 15, got 8.5"),
        ({"givens": 8.0}, "givens must be a whole number from 4 to 15, got 8.0"),
        ({"givens": "few"}, "givens must be a whole number from 4 to 15, got 'few'"),
        ({"max_actions": 7}, "max_actions must be a whole number from 8 on, got 7"),
        ({"givens": 4, "max_actions": 11}, "max_actions must be a whole number from 12 on, got 11"),
        ({"max_actions": 16.5}, "max_actions must be a whole number from 8 on, got 16.5"),
        ({"candidates": "no"}, "candidates must be true or false, got 'no'"),
    ],
)
def test_settings_outside_their_limits_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Sudoku(**settings)
