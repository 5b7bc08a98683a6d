"""Estimates and intervals on grids whose answers are known or can be counted by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.analysis.statistics import (
    Difference,
    Interval,
    Scores,
    balanced_scores,
    bootstrap_interval,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    resampled_means,
    t_interval,
)
from pipeline.workspace.randomness import generator

RESAMPLES = 400


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


def test_resampled_means_equal_a_loop_over_the_same_draws() -> None:
    grid = draws("grid").random((3, 5))
    fast = resampled_means(grid, 50, draws())
    again = draws()
    seed_counts = again.multinomial(3, [1 / 3] * 3, size=50)
    state_counts = again.multinomial(5, [1 / 5] * 5, size=50)
    for number in range(50):
        seeds = [seed for seed in range(3) for _ in range(seed_counts[number, seed])]
        states = [state for state in range(5) for _ in range(state_counts[number, state])]
        assert (len(seeds), len(states)) == (3, 5)
        assert fast[number] == pytest.approx(np.mean([grid[i, j] for i in seeds for j in states]))


def test_interval_covers_the_true_rate_about_as_often_as_it_claims() -> None:
    """Success depends on seed and state; nominal 95 %, and few seeds cost some of it."""
    noise, covered = draws("population"), 0
    for number in range(200):
        logit = noise.normal(0, 0.4, (6, 1, 1)) + noise.normal(0, 1, (1, 32, 1))
        success = (noise.random((6, 32, 4)) < 1 / (1 + np.exp(-logit))).astype(float)
        interval = bootstrap_interval(success, 200, draws(f"coverage {number}"))
        covered += interval.low <= 0.5 <= interval.high
    assert 0.87 <= covered / 200 <= 0.99


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_intervals_of_constant_data_are_points(value: float) -> None:
    success = np.full((4, 8, 2), value)
    interval, over_seeds = bootstrap_interval(success, RESAMPLES, draws()), t_interval(success)
    assert over_seeds is not None
    assert interval.low == pytest.approx(value)
    assert interval.high == pytest.approx(value)
    assert (over_seeds.low, over_seeds.high) == (value, value)


def test_single_seed_resamples_states_only_and_has_no_t_interval() -> None:
    one = coins(0.5, seeds=1)
    assert t_interval(one.success) is None
    interval = bootstrap_interval(one.success, RESAMPLES, draws())
    assert interval.low < one.success.mean() < interval.high
    same_everywhere = np.tile([[[1.0, 0.0]]], (1, 8, 1))
    point = bootstrap_interval(same_everywhere, RESAMPLES, draws())
    assert point.low == pytest.approx(0.5)
    assert point.high == pytest.approx(0.5)


def test_t_interval_is_scipys() -> None:
    success = coins(0.4).success
    means = success.mean(axis=(1, 2))
    expected = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
    found = t_interval(success)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(expected)


def test_interquartile_mean_drops_the_outer_quarters_of_seed_state_scores() -> None:
    cells = np.array([[0.0, 0.1, 0.4, 0.5], [0.6, 0.7, 0.9, 1.0]])
    assert interquartile_mean(cells[:, :, None]) == pytest.approx((0.4 + 0.5 + 0.6 + 0.7) / 4)


def test_a_paired_difference_has_the_t_interval_over_the_seeds_differences() -> None:
    hard = draws("states").random((1, 16, 1)) * 0.6
    better, worse, equal = (coins(rate, 6, name=name) for rate, name in ((hard + 0.35, "x"), (hard, "y"), (hard, "z")))
    clear = paired_difference(better, worse)
    by_seed = (better.success - worse.success).mean(axis=(1, 2))
    assert clear.by_seed == pytest.approx(by_seed)
    assert clear.value == pytest.approx(by_seed.mean())
    assert clear.interval is not None
    assert (clear.interval.low, clear.interval.high) == pytest.approx(
        stats.t.interval(0.95, 5, by_seed.mean(), stats.sem(by_seed))
    )
    assert clear.verdict == "higher"
    assert paired_difference(worse, better).verdict == "lower"
    unclear = paired_difference(worse, equal)
    assert unclear.interval is not None
    assert unclear.interval.low < 0 < unclear.interval.high
    assert unclear.verdict == "not told apart"


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_below_six_paired_seeds_there_is_neither_interval_nor_verdict(seeds: int) -> None:
    up, down = coins(0.9, seeds, name="up"), coins(0.1, seeds + 3, name="down")
    found = paired_difference(up, down)
    assert (found.interval, found.verdict, len(found.by_seed)) == (None, None, seeds)
    assert found.value > 0.5


@pytest.mark.parametrize("seeds", [6, 10])
@pytest.mark.parametrize(("between_seeds", "between_states"), [(1.5, 0.2), (0.05, 2.5), (0.5, 0.5)])
def test_equal_methods_are_called_different_about_as_often_as_a_5_per_cent_test_may(
    seeds: int, between_seeds: float, between_states: float
) -> None:
    """Two methods of the same distribution; their trainings are independent, and they play the same states."""
    repetitions, states, rollouts = 2500, 24, 2
    noise = draws(f"equals {seeds} {between_seeds}")
    logit = noise.normal(0, between_states, (repetitions, 1, 1, states, 1))
    logit = logit + noise.normal(0, between_seeds, (repetitions, 2, seeds, 1, 1))
    success = (noise.random((repetitions, 2, seeds, states, rollouts)) < 1 / (1 + np.exp(-logit))).astype(float)
    wrong = [paired_difference(scores(x), scores(y)).verdict != "not told apart" for x, y in success]
    assert 0.03 < np.mean(wrong) < 0.075


def test_degenerate_differences_have_the_verdict_that_they_should() -> None:
    thirds = scores(np.tile([[[1.0, 0.0, 0.0]]], (7, 7, 1)))
    sixths = scores(np.tile([[[1.0, 0.0, 0.0] * 2]], (7, 7, 1)))
    same = paired_difference(thirds, sixths)
    assert (same.value, same.interval, same.verdict) == (0.0, Interval(0.0, 0.0), "not told apart")
    all_won, none_won = scores(np.ones((6, 3, 2))), scores(np.zeros((6, 3, 1)))
    assert paired_difference(all_won, none_won).verdict == "higher"
    one_in_six = scores(np.array([1.0, 0, 0, 0, 0, 0])[:, None, None])
    assert paired_difference(one_in_six, scores(np.zeros((6, 1, 1)))).verdict == "not told apart"
    undefined = Difference(float("nan"), Interval(float("nan"), float("nan")), (float("nan"),) * 6)
    assert undefined.verdict is None


def test_an_episode_without_a_result_is_named() -> None:
    cells: list[Any] = [*CELLS[:5], (*CELLS[5][:3], None), *CELLS[6:]]
    seed, state, rollout = CELLS[5][:3]
    with pytest.raises(ValueError, match=f"seed {seed}, state '{state}', rollout {rollout} has no result"):
        balanced_scores(table(cells), 0.5)


def test_pairing_removes_what_two_methods_share() -> None:
    """States of very different difficulty widen each interval, not that of the difference."""
    worse = scores(np.repeat((np.arange(16) % 4 > 1).astype(float)[None, :, None], 4, axis=0))
    better = scores(worse.success * 0.5 + 0.5)
    alone = bootstrap_interval(worse.success, RESAMPLES, draws())
    assert set(paired_difference(worse, worse).by_seed) == {0.0}
    assert alone.high - alone.low > 0.3
    assert paired_difference(better, worse).value == pytest.approx(0.25)


def test_difference_uses_common_seeds_and_states_matched_by_label() -> None:
    success = draws("common").random((4, 6, 2)).round()
    later = Scores((2, 3, 9), ("s004", "s005", "zz"), np.zeros((3, 3, 2)))
    found = paired_difference(scores(success), later)
    assert found.by_seed == pytest.approx(success[2:, 4:].mean(axis=(1, 2)))
    assert found.value == pytest.approx(success[2:, 4:].mean())
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference(scores(success), scores(success, first_seed=10))
    with pytest.raises(ValueError, match="no state in common"):
        probability_of_improvement(scores(success), scores(success, first_state=50))


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


def test_same_name_same_interval() -> None:
    success = coins(0.5).success
    assert bootstrap_interval(success, RESAMPLES, draws("a")) == bootstrap_interval(success, RESAMPLES, draws("a"))
    assert bootstrap_interval(success, RESAMPLES, draws("a")) != bootstrap_interval(success, RESAMPLES, draws("b"))
