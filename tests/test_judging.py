"""``judge``: its tests against scipy and statsmodels, its words, its families, and how often they are wrong."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pipeline.analysis.intervals import two_way
from pipeline.analysis.power import least_seeds
from pipeline.analysis.simulation import MIXES, verdicts
from pipeline.analysis.verdicts import Verdict, adjusted, equivalence_p, judge, measure, sign_flip_p, words
from pipeline.settings.params import Family
from pipeline.workspace.randomness import generator


def grid(mean: float, seeds: int = 8, states: int = 16, spread: float = 0.1, name: Any = 0) -> np.ndarray:
    draws = generator(0, "judged", name, seeds, states)
    return np.asarray(mean + draws.normal(0, spread, (seeds, states)) + draws.normal(0, spread / 4, (seeds, 1)))


@pytest.mark.parametrize("seeds", [2, 5, 8, 11])
def test_sign_flips_are_scipys_permutation_test(seeds: int) -> None:
    for number in range(5):
        means = generator(number, "flips").normal(0.4, 1.0, seeds).round(1 if number else 3)
        expected = stats.permutation_test(
            (means,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        ).pvalue
        assert sign_flip_p(means) == pytest.approx(expected)


def test_beyond_fifteen_seeds_flips_are_drawn_and_near_the_exact_p() -> None:
    means = generator(0, "many flips").normal(0.3, 1.0, (3, 16))
    exact = sign_flip_p(means, 2**16)
    assert sign_flip_p(means) == pytest.approx(exact, abs=0.01)
    assert np.array_equal(sign_flip_p(means), sign_flip_p(means))


def test_the_greater_p_counts() -> None:
    """States that differ widen the t; five of six seeds on one side are too few for flips, however small the error."""
    flipped = np.repeat(np.array([[1.0], [1.0], [1.0], [1.0], [1.0], [-0.01]]), 4, axis=1)
    assert measure(flipped).p == pytest.approx(4 / 64)
    states = np.tile(np.array([1.0, -0.9, 1.2, -1.0]), (10, 1))
    assert sign_flip_p(states.mean(axis=1)) == pytest.approx(2 / 2**10)
    assert measure(states).p == pytest.approx(stats.ttest_1samp(states[0], 0.0).pvalue)


@pytest.mark.parametrize(("family", "method"), [("holm", "holm"), ("screening", "fdr_bh")])
def test_p_values_are_adjusted_as_statsmodels_does(family: Family, method: str) -> None:
    draws = generator(0, "adjusted")
    for size in (1, 2, 7, 30):
        p = draws.random((3, size)) ** 3
        found = adjusted(p, family)
        assert found == pytest.approx(np.array([multipletests(row, method=method)[1] for row in p]))


def test_equivalence_is_two_one_sided_t_tests() -> None:
    d = generator(0, "tost").normal(0.01, 0.1, (12, 1))
    low = stats.ttest_1samp(d[:, 0], -0.05, alternative="greater").pvalue
    high = stats.ttest_1samp(d[:, 0], 0.05, alternative="less").pvalue
    assert equivalence_p(two_way(d), 0.05) == pytest.approx(max(low, high))


def test_each_word_is_spoken_where_it_should_be() -> None:
    found = judge([grid(0.4), grid(-0.4), grid(0.0, spread=0.03), grid(0.04, states=64, spread=0.35)])
    assert [one.verdict for one in found] == ["better", "worse", "equivalent", "undecided"]
    assert set(get_args(Verdict)) == {one.verdict for one in found}
    undecided = found[-1]
    assert undecided.detectable is not None
    assert undecided.detectable > abs(undecided.value)
    assert undecided.seeds_needed is not None
    assert undecided.seeds_needed > 8
    assert [one.seeds_needed for one in found[:3]] == [None] * 3


def test_a_family_is_stricter_than_one_comparison_and_screening_than_neither() -> None:
    clear = [grid(0.06, seeds=10, name=number) for number in range(3)]
    noise = [grid(0.0, seeds=10, spread=0.5, name=number) for number in range(9)]
    alone, holm, screened = (
        judge(clear + more, family)[0] for more, family in (([], "holm"), (noise, "holm"), (noise, "screening"))
    )
    assert alone.p == holm.p == screened.p
    assert alone.p_adjusted < screened.p_adjusted < holm.p_adjusted  # type: ignore[operator]
    assert alone.interval == holm.interval


@pytest.mark.parametrize(
    ("size", "family", "least"),
    [
        (1, "holm", 6),
        (2, "holm", 7),
        (4, "holm", 8),
        (6, "holm", 8),
        (7, "holm", 9),
        (25, "holm", 10),
        (40, "screening", 6),
    ],
)
def test_no_verdict_below_the_fewest_seeds_at_which_flips_can_reject(size: int, family: Family, least: int) -> None:
    assert least_seeds(size, 0.05, family) == least
    for seeds in (least - 1, least):
        clear = [np.full((seeds, 4), 0.5)] * size
        found = judge(clear, family)
        assert {one.verdict for one in found} == ({None} if seeds < least else {"better"})
        assert {one.interval for one in found} != {None}


def test_a_look_at_a_smaller_alpha_takes_more_seeds() -> None:
    assert least_seeds(1, 0.01) == 8
    (found,) = judge([np.full((7, 4), 0.5)], alpha=0.01)
    assert found.verdict is None
    (found,) = judge([np.full((8, 4), 0.5)], alpha=0.01)
    assert found.verdict == "better"


def test_degenerate_comparisons() -> None:
    nothing, always, one_seed, undefined = judge(
        [np.zeros((9, 5)), np.ones((9, 5)), np.full((1, 5), 0.3), np.full((9, 5), np.nan)]
    )
    assert (nothing.value, nothing.p, nothing.verdict) == (0.0, 1.0, "equivalent")
    assert (always.value, always.verdict, always.detectable) == (1.0, "better", 0.0)
    for one in (one_seed, undefined):
        assert (one.interval, one.p, one.p_adjusted, one.verdict, one.seeds_needed) == (None,) * 5
    assert always.p_adjusted == pytest.approx(4 * 2 / 2**9)  # the two that cannot be tested count
    assert judge([]) == []


def test_what_is_not_declared_has_an_interval_and_no_verdict() -> None:
    found = measure(grid(0.4))
    assert found.interval is not None
    assert found.p is not None
    assert (found.p_adjusted, found.p_equivalence, found.verdict, found.detectable) == (None,) * 4


@given(st.integers(2, 12), st.integers(1, 10), st.floats(-0.3, 0.3), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_verdicts_mirror_and_agree_with_their_intervals(seeds: int, states: int, mean: float, number: int) -> None:
    d = grid(mean, seeds, states, name=number)
    (one,), (other,) = judge([d]), judge([-d])
    assert other.value == pytest.approx(-one.value)
    assert (one.p, one.p_equivalence) == pytest.approx((other.p, other.p_equivalence))
    mirror = {"better": "worse", "worse": "better"}
    assert other.verdict == mirror.get(one.verdict or "", one.verdict)
    assert one.interval is not None
    if one.verdict in mirror:
        assert one.interval.low > 0 or one.interval.high < 0
        assert (one.verdict == "better") == (one.value > 0)
    if one.verdict == "equivalent":
        assert -0.05 < one.value < 0.05
    assert (one.verdict is None) == (seeds < 6)


def test_a_difference_is_named_before_equivalence() -> None:
    assert str(words(0.01, 0.01, 0.01)) == "better"
    assert words(np.array([-1.0, 0.0]), np.array([0.04, 0.06]), np.array([0.9, 0.01])).tolist() == [
        "worse",
        "equivalent",
    ]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", [1, 6])
def test_equal_methods_are_called_different_in_at_most_5_per_cent_of_families(mix: str, family: int) -> None:
    """Of 2000 families a share of 5 % has a standard error of 0.5 points: 6.5 % is three above."""
    for seeds in (10, 20):
        assert verdicts(mix, seeds, 32, 2000, 0.0, family)["different"] <= 0.065


@pytest.mark.parametrize("mix", MIXES)
def test_methods_that_differ_by_the_smallest_effect_are_called_equivalent_in_at_most_5_per_cent(mix: str) -> None:
    assert verdicts(mix, 10, 64, 2000, 0.05)["equivalent"] <= 0.065


def test_a_difference_that_matters_is_seen() -> None:
    assert verdicts("episodes", 10, 32, 1000, 0.15)["better"] > 0.95
    assert verdicts("all", 20, 32, 1000, 0.15)["better"] > 0.85
    assert verdicts("episodes", 20, 64, 1000, 0.0)["equivalent"] > 0.85
    assert verdicts("all", 6, 32, 100, 0.0, family=6) == {}
