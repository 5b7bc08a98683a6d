"""Sudoku's expert."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from pipeline.environments.sudoku import SudokuExpert
from tests.puzzles import SEVEN, given, started


def test_the_expert_fills_the_first_cell_with_the_fewest_candidates() -> None:
    environment, draws = given(SEVEN), np.random.default_rng(0)
    moves = {SudokuExpert().act(environment, draws) for _ in range(100)}
    assert moves == {"1,3,3"}


def test_the_expert_repairs_a_wrong_digit_first() -> None:
    environment, draws = given(SEVEN), np.random.default_rng(0)
    environment.step("2,4,3")
    assert {SudokuExpert().act(environment, draws) for _ in range(20)} == {"2,4,2"}


def test_the_expert_makes_way_where_two_wrong_digits_block_each_other() -> None:
    puzzle = (*[0] * 8, 2, 0, 0, 3, 4, 0, 0, 1)
    for seed in range(20):
        environment, draws = given(puzzle, max_actions=20), np.random.default_rng(seed)
        assert [environment.step(move)[1] for move in ("1,2,3", "1,3,2")] == [0.5, 0.5]
        assert [environment.step(move)[1] for move in ("1,2,2", "1,3,3")] == [-0.1, -0.1]
        while not environment.done:
            environment.step(SudokuExpert().act(environment, draws))
        assert environment.success


def test_the_expert_always_has_a_legal_move_and_mostly_recovers_from_random_ones() -> None:
    solved = 0
    for state in range(200):
        environment, draws = started(state, givens=6, max_actions=30), np.random.default_rng(state)
        for _ in range(8):
            environment.step(SudokuExpert().random_action(environment, draws))
        while not environment.done:
            observation, reward, *_ = environment.step(SudokuExpert().act(environment, draws))
            assert reward >= 0
            assert "invalid" not in observation
        solved += environment.success
    assert solved > 160


def test_random_actions_are_legal_digits_in_empty_cells() -> None:
    environment, draws = given(SEVEN), np.random.default_rng(0)
    moves = Counter(SudokuExpert().random_action(environment, draws) for _ in range(1100))
    legal = ("1,3,3", "2,1,3", "2,4,2", "2,4,3", "3,1,2", "3,1,3", "3,4,2", "3,4,3", "4,2,3", "4,3,2", "4,3,3")
    assert set(moves) == {environment.parse_action(move) for move in legal}
    assert max(abs(count - 100) for count in moves.values()) < 50


def test_where_no_empty_cell_has_a_legal_digit_random_actions_are_any_digit_in_any_cell() -> None:
    environment, draws = given(SEVEN), np.random.default_rng(0)
    assert [environment.step(move)[1] for move in ("2,4,3", "3,4,2", "3,1,3", "4,3,3")] == [0.5] * 4
    assert environment._observe().endswith("candidates\n1,3: none\n2,1: none\n4,2: none")
    moves = Counter(SudokuExpert().random_action(environment, draws) for _ in range(6400))
    assert len(moves) == 64
    assert max(abs(count - 100) for count in moves.values()) < 50


def test_the_experts_reasoning_never_names_a_move_and_has_the_length_asked_for() -> None:
    draws, said = np.random.default_rng(0), Counter[str]()
    for state in range(100):
        environment = started(state)
        for words in (0, 1, 5, 14, 40):
            reasoning = SudokuExpert().reason(environment, words, draws)
            assert len(reasoning.split()) == words
            assert not re.search(r"place|\brow \d|\bcol(umn)? \d|,", reasoning)
            said.update([reasoning])
    assert len(said) > 280
