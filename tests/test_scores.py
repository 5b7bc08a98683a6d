"""Grids of success, and what is read from them, on numbers that can be counted by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.analysis.scores import (
    Scores,
    balanced_scores,
    interquartile_mean,
    paired_grid,
    probability_of_improvement,
)
from pipeline.workspace.randomness import generator


def draws(name: str = "test") -> np.random.Generator:
    return generator(0, name)


def scores(success: np.ndarray, first_seed: int = 0, first_state: int = 0) -> Scores:
    seeds, states, _ = success.shape
    return Scores(
        tuple(range(first_seed, first_seed + seeds)),
        tuple(f"s{number:03d}" for number in range(first_state, first_state + states)),
        success,
    )


def coins(rate: np.ndarray | float, seeds: int = 4, states: int = 16, rollouts: int = 3, name: str = "coins") -> Scores:
    uniforms = draws(name).random((seeds, states, rollouts))
    return scores((uniforms < rate).astype(float))


def table(cells: list[tuple[int, str, int, bool]], temperature: float = 0.5, method: str = "grpo") -> pa.Table:
    columns = dict(zip(("seed", "state", "rollout", "success"), map(list, zip(*cells, strict=True)), strict=True))
    return pa.table(
        {
            "environment": ["lake"] * len(cells),
            "method": [method] * len(cells),
            "temperature": [temperature] * len(cells),
            **columns,
        }
    )


CELLS = [(seed, state, rollout, (seed + rollout) % 2 == 0) for seed, state, rollout in product((7, 3), "ba", range(3))]


def test_grid_is_sorted_by_label_whatever_the_order_of_rows() -> None:
    grid = balanced_scores(table(CELLS), 0.5)
    assert (grid.seeds, grid.states) == ((3, 7), ("a", "b"))
    assert grid.success.tolist() == [[[0, 1, 0]] * 2] * 2
    shuffled = [CELLS[i] for i in draws().permutation(len(CELLS))]
    assert np.array_equal(balanced_scores(table(shuffled), 0.5).success, grid.success)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (CELLS[:4] + CELLS[5:], "lake-grpo at temperature 0.5: unbalanced, seed 7, state 'a', rollout 1 is missing"),
        ([*CELLS, CELLS[0]], "seed 7, state 'b', rollout 0 is there more than once"),
    ],
)
def test_unbalanced_table_names_the_first_wrong_episode(cells: list[tuple[int, str, int, bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_scores(table(cells), 0.5)


def test_missing_temperature_and_mixed_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no episodes at temperature 1; there are: 0\.5"):
        balanced_scores(table(CELLS), 1.0)
    with pytest.raises(ValueError, match="one environment and one method"):
        balanced_scores(pa.concat_tables([table(CELLS), table(CELLS, method="ppo")]), 0.5)


def test_interquartile_mean_drops_the_outer_quarters_of_seed_state_scores() -> None:
    cells = np.array([[0.0, 0.1, 0.4, 0.5], [0.6, 0.7, 0.9, 1.0]])
    assert interquartile_mean(cells[:, :, None]) == pytest.approx((0.4 + 0.5 + 0.6 + 0.7) / 4)


def test_an_episode_without_a_result_is_named() -> None:
    cells: list[Any] = [*CELLS[:5], (*CELLS[5][:3], None), *CELLS[6:]]
    seed, state, rollout = CELLS[5][:3]
    with pytest.raises(ValueError, match=f"seed {seed}, state '{state}', rollout {rollout} has no result"):
        balanced_scores(table(cells), 0.5)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_probability_of_improvement_is_the_share_of_won_pairs(
    x_seeds: int, y_seeds: int, x_rollouts: int, y_rollouts: int, number: int
) -> None:
    noise = draws(f"pairs {number}")
    x = scores(noise.integers(0, 2, (x_seeds, 3, x_rollouts)).astype(float))
    y = scores(noise.integers(0, 2, (y_seeds, 3, y_rollouts)).astype(float))
    found = probability_of_improvement(x, y)
    won = 0.0
    for i, j in product(range(x_seeds), range(y_seeds)):
        a, b = int(x.success[i].sum()) * y_rollouts, int(y.success[j].sum()) * x_rollouts
        won += 1.0 if a > b else 0.5 if a == b else 0.0
    assert found == pytest.approx(won / (x_seeds * y_seeds))


def test_probability_of_improvement_is_one_for_dominance_and_half_for_ties() -> None:
    up, down = coins(0.9, name="up"), coins(0.1, name="down")
    assert probability_of_improvement(up, down) == 1
    flat = scores(np.tile([[[1.0, 0.0, 0.0]]], (4, 7, 1)))  # thirds: ties must survive floating point
    assert probability_of_improvement(flat, flat) == 0.5


def test_a_paired_grid_has_the_common_seeds_and_states_matched_by_label() -> None:
    success = draws("common").random((4, 6, 2)).round()
    theirs = draws("later").random((3, 3, 4)).round()
    later = Scores((9, 3, 2), ("s004", "s005", "zz"), theirs)
    found = paired_grid(scores(success), later)
    by_hand = [
        [success[seed, state].mean() - theirs[4 - seed, state - 4].mean() for state in (4, 5)] for seed in (2, 3)
    ]
    assert found == pytest.approx(np.array(by_hand))
    with pytest.raises(ValueError, match="no seed in common"):
        paired_grid(scores(success), scores(success, first_seed=10))
    with pytest.raises(ValueError, match="no state in common"):
        probability_of_improvement(scores(success), scores(success, first_state=50))


def test_equals_of_different_numbers_of_episodes_differ_by_zero() -> None:
    thirds = scores(np.tile([[[1.0, 0.0, 0.0]]], (7, 7, 1)))
    sixths = scores(np.tile([[[1.0, 0.0, 0.0] * 2]], (7, 7, 1)))
    assert np.array_equal(paired_grid(thirds, sixths), np.zeros((7, 7)))
