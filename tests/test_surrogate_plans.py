"""Surrogates that look at a whole minibatch first: covariance, moving bounds, where a token leads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.surrogates import (
    covariance,
    future_kl,
    plan_balanced_clip,
    plan_covariance_clip,
    plan_covariance_kl,
)
from pipeline.settings.surrogate import BalancedClip, CovarianceClip, CovarianceKL
from tests.batches import batches, method, properties, section
from tests.surrogate_references import (
    Given,
    covariances,
    enough,
    expect_bounds,
    expect_future,
    few,
    held_by_ppo,
    in_update,
    loss_and_slope,
    planned,
    room,
    row_of,
)

# ------------------------------------------------------------------------------------------------------ covariance


@properties
@given(batches())
def test_covariance_equals_reference(batch: TokenBatch) -> None:
    assume(bool(batch.trainable.any()))
    tokens = in_update(row_of("ppo_clip"), batch)
    assert covariance(tokens).tolist() == pytest.approx(covariances(Given.of(tokens)), abs=1e-9)


@properties
@given(batches(), st.sampled_from([1e-6, 0.3, 1.0]), st.sampled_from([(0.05, 2.0), (-0.1, 0.1), (50.0, 60.0)]))
def test_plan_of_covariance_clip(batch: TokenBatch, share: float, band: tuple[float, float]) -> None:
    """So many tokens of the band that PPO's clip leaves as there is room for: the ones with the smallest draws."""
    assume(bool(batch.trainable.any()))
    tokens = in_update(row_of("ppo_clip"), batch)
    with torch.no_grad():
        plan = plan_covariance_clip(tokens, section(CovarianceClip, low=0.2, high=0.2, share=share, band=band))
    assert plan.shape == (len(tokens.logprob), 1)
    given_numbers = Given.of(tokens)
    held = held_by_ppo(given_numbers, 0.8, 1.2)
    candidates = [t for t, c in enumerate(covariances(given_numbers)) if band[0] < c < band[1] and not held[t]]
    chosen = [t for t, mark in enumerate(plan[:, 0].tolist()) if mark == 1.0]
    assert plan.sum() == len(chosen) == min(room(share, len(plan)), len(candidates))
    assert set(chosen) <= set(candidates)
    left = [given_numbers.noise[t] for t in candidates if t not in chosen]
    assert all(given_numbers.noise[t] < other for t in chosen for other in left)


def test_covariance_clip_drops_at_least_one_token_at_random() -> None:
    """Covariances 1.5, 0.5, 0.5, 1.5 times the spread of log pi; all four are in the band, and one is dropped."""
    ratios, advantages = [math.exp(x) for x in (-1.5, -0.5, 0.5, 1.5)], [-1.0, -1.0, 1.0, 1.0]
    wide = {"low": 0.9, "high": 10.0}
    row = method(surrogate={"kind": "covariance_clip", "share": 1e-6, "band": (0.4, 2.0), **wide})
    for lowest in range(4):
        draws = [0.9, 0.8, 0.7, 0.6]
        draws[lowest] = 0.1
        tokens = few(ratios, advantages, draws=draws)
        assert planned(row, tokens).flatten().tolist() == [float(t == lowest) for t in range(4)]  # type: ignore[union-attr]
        loss, slope, clipped = loss_and_slope(row, tokens)
        assert (loss[lowest], slope[lowest], clipped[lowest]) == (0.0, 0.0, True)
        assert loss[(lowest + 1) % 4] != 0.0
    narrow = method(surrogate={"kind": "covariance_clip", "share": 1.0, "band": (1.0, 2.0), **wide})
    plan = planned(narrow, few(ratios, advantages))
    assert plan is not None
    assert plan.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]
    outside = method(surrogate={"kind": "covariance_clip", "share": 1.0, "band": (3.0, 4.0), **wide})
    ppo = method(surrogate={"kind": "ppo_clip", **wide})
    assert loss_and_slope(outside, few(ratios, advantages)) == loss_and_slope(ppo, few(ratios, advantages))


@properties
@given(batches(), st.sampled_from([1e-6, 0.4, 0.5, 1.0]))
def test_plan_of_covariance_kl(batch: TokenBatch, share: float) -> None:
    """No token that is left out has a higher covariance than one that is chosen."""
    assume(bool(batch.trainable.any()))
    tokens = in_update(row_of("ppo_clip"), batch)
    with torch.no_grad():
        plan = plan_covariance_kl(tokens, section(CovarianceKL, share=share))
    assert plan.shape == (len(tokens.logprob), 1)
    marks, cov = plan[:, 0].tolist(), covariances(Given.of(tokens))
    chosen, left = ([c for c, mark in zip(cov, marks, strict=True) if mark == own] for own in (1.0, 0.0))
    assert len(chosen) == room(share, len(cov))
    assert len(chosen) + len(left) == len(cov)
    assert min(chosen) >= max(left, default=-math.inf) - 1e-9


def test_covariance_kl_by_hand() -> None:
    """Covariances 2, 0, 0, 4 (up to a factor): with room for one, the last token pays |log 3|; no ratio is clipped."""
    row = method(surrogate={"kind": "covariance_kl", "share": 1e-6, "coefficient": 0.5})
    loss, slope, clipped = loss_and_slope(row, few([0.5, 1.0, 1.0, 3.0], [-1.0, 0.0, 0.0, 2.0]))
    assert loss == pytest.approx([0.5, 0, 0, -6 + 0.5 * math.log(3)])
    assert slope == pytest.approx([0.5, 0, 0, -6 + 0.5])
    assert clipped == [False] * 4


# --------------------------------------------------------------------------------------------------- balanced clip


@pytest.mark.parametrize("first", ["high", "low"])
@pytest.mark.parametrize("share_of", ["total", "negative"])
@pytest.mark.parametrize("by_probability", [True, False])
@given(
    batches(),
    st.sampled_from([(0.02, 0.05), (0.31, 0.2)]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([0.5, 1.5]),
)
@properties
def test_plan_of_balanced_clip(
    by_probability: bool,
    share_of: str,
    first: str,
    batch: TokenBatch,
    step: tuple[float, float],
    share: float,
    spread: float,
) -> None:
    assume(bool(batch.trainable.any()))
    tokens = in_update(row_of("ppo_clip"), batch, spread)
    low, high = (0.6, 0.9), (1.2, 3.0)
    settings = {
        "low": low,
        "high": high,
        "high_step": step[1],
        "positive_share": share,
        "share_of": share_of,
        "first": first,
        "by_probability": by_probability,
    }
    with torch.no_grad():
        plan = plan_balanced_clip(tokens, section(BalancedClip, **settings))
    assert plan.shape == (len(tokens.logprob), 2)
    assert bool((plan == plan[0]).all())
    numbers = Given.of(tokens)
    bounds = plan[0].tolist()
    expected = expect_bounds(numbers, low, high, step, share, share_of, first, by_probability)
    assert bounds == pytest.approx(expected, abs=1e-9)
    assert low[0] <= bounds[0] <= low[1]
    assert high[0] <= bounds[1] <= high[1]
    at_ends = bounds == [low[1], high[1]]
    assert at_ends or enough(numbers, bounds[0], bounds[1], share, share_of, by_probability)
    second_moved = bounds[0] > low[0] if first == "high" else bounds[1] > high[0]
    if second_moved:
        assert bounds[1] == high[1] if first == "high" else bounds[0] == low[1]


def test_balanced_clip_by_hand() -> None:
    """Positive: 1 + min(2, high). Negative: 4 times max(0.5, low), at least 2.4; half of all is asked for.

    high first: 1 + 1.2 is less than 2.4, 1 + 1.35 too, and 1 + 1.5 is enough. low first moves away from it: 4 * 0.9 = 3.6 at
    its end, and then 1 + 2 at most, so that both end at their ends.
    """
    tokens = few([1.0, 2.0, 0.5, 0.5, 0.5, 0.5], [1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    options: dict[str, Any] = {"kind": "balanced_clip", "high_step": 0.15, "positive_share": 0.5}
    for first, bounds in (("high", [0.6, 1.5]), ("low", [0.9, 3.0])):
        plan = planned(method(surrogate=options | {"first": first}), tokens)
        assert plan is not None
        assert plan[0].tolist() == pytest.approx(bounds)
    # Half of 2.4 is reached at once.
    plan = planned(method(surrogate=options | {"share_of": "negative"}), tokens)
    assert plan is not None
    assert plan[0].tolist() == pytest.approx([0.6, 1.2])
    loss, slope, clipped = loss_and_slope(method(surrogate=options), tokens)
    assert loss == pytest.approx([-1, -1.5, 0.6, 0.6, 0.6, 0.6])
    assert slope == pytest.approx([-1, 0, 0, 0, 0, 0])
    assert clipped == [False, True, True, True, True, True]


def test_balanced_clip_counts_a_token_as_often_as_the_behaviour_policy_chooses_it() -> None:
    """Of ratios 1 the positive one had a chance of 0.6 and the negative one of 0.3: 2/3 of all. Alike, they are a half."""
    tokens = few([1.0, 1.0], [1.0, -1.0])
    chances = torch.tensor([0.6, 0.3], dtype=torch.float64).log()
    tokens = replace(tokens, logprob=chances.clone().requires_grad_(True), logprob_old=chances)
    for by_probability, bounds in ((True, [0.6, 1.2]), (False, [0.9, 3.0])):
        row = method(surrogate={"kind": "balanced_clip", "positive_share": 0.6, "by_probability": by_probability})
        plan = planned(row, tokens)
        assert plan is not None
        assert plan[0].tolist() == pytest.approx(bounds)


def test_balanced_clip_as_released() -> None:
    """Twice 1 against 3 * 0.8 is above a half: nothing moves. A ratio of 4 counts as 3 where A < 0, and has no gradient."""
    code = {"low": (0.8, 0.95), "high": (1.2, 2.0), "high_step": 0.1, "positive_share": 0.5}
    code |= {"share_of": "negative", "first": "low", "by_probability": False, "dual": 3.0}
    row = method(surrogate={"kind": "balanced_clip", **code})
    loss, slope, clipped = loss_and_slope(row, few([1.0, 1.0, 0.7, 0.7, 0.7], [1.0, 1.0, -1.0, -1.0, -1.0]))
    assert loss == pytest.approx([-1, -1, 0.8, 0.8, 0.8])
    assert clipped == [False, False, True, True, True]
    # One against 4 is a quarter: both move to their ends, where it still is.
    tokens = few([1.5, 4.0], [1.0, -1.0])
    plan = planned(row, tokens)
    assert plan is not None
    assert plan[0].tolist() == pytest.approx([0.95, 2.0])
    loss, slope, clipped = loss_and_slope(row, tokens)
    assert loss == pytest.approx([-1.5, 3.0])
    assert slope == pytest.approx([-1.5, 0.0])
    assert clipped == [False, True]


def test_balanced_clip_weighs_by_the_coefficients() -> None:
    tokens = few([1.0, 1.0], [1.0, -1.0])
    row = method(surrogate={"kind": "balanced_clip", "positive_share": 0.6})
    heavy = replace(tokens, coefficient=torch.tensor([2.0, 1.0], dtype=torch.float64))
    light = replace(tokens, coefficient=torch.tensor([1.0, 2.0], dtype=torch.float64))
    ends = [planned(row, one)[0].tolist() for one in (heavy, light)]  # type: ignore[index]
    assert ends == [pytest.approx([0.6, 1.2]), pytest.approx([0.9, 3.0])]


# -------------------------------------------------------------------------------------------------- procedure clip


@properties
@given(batches(), st.sampled_from([0.5, 4.0, 64.0]), st.sampled_from([0.1, 1.0986]))
def test_future_kl_equals_reference(batch: TokenBatch, half_life: float, largest: float) -> None:
    tokens = in_update(row_of("procedure_clip"), batch, spread=1.0)
    actual = future_kl(tokens, half_life=half_life, largest_shift=largest)
    assert actual.tolist() == pytest.approx(expect_future(Given.of(tokens), half_life, largest), abs=1e-9)
    assert not actual.requires_grad


def test_a_token_counts_half_64_tokens_earlier() -> None:
    row = method(surrogate={"kind": "procedure_clip"}).surrogate
    assert row.kind == "procedure_clip"
    tokens = few([1.0] * 128 + [math.e], [1.0] * 129)
    leads = future_kl(tokens, half_life=row.half_life, largest_shift=row.largest_shift).tolist()
    assert [leads[128], leads[64], leads[0]] == pytest.approx([1.0, 0.5, 0.25])


def test_tokens_above_log_3_are_left_out() -> None:
    row = method(surrogate={"kind": "procedure_clip"}).surrogate
    assert row.kind == "procedure_clip"
    assert row.largest_shift == pytest.approx(math.log(3), abs=1e-4)
    tokens = few([1.0, 3.01, 2.99], [1.0] * 3)
    leads = future_kl(tokens, half_life=1.0, largest_shift=row.largest_shift).tolist()
    assert leads == pytest.approx([math.log(2.99) / 4, math.log(2.99) / 2, math.log(2.99)])


@pytest.mark.parametrize(("form", "factors"), [("raw", [2.2, 2.05, 2.0]), ("centred", [1.2, 1.05, 1.0])])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_procedure_clip_scales_by_where_a_token_leads(form: str, factors: list[float], advantage: float) -> None:
    """At b = 1 and ratio 1: exp(FutureKL) of 1.25, 1.05 and 0.9 counts as 1.2, 1.05 and 1."""
    following = [1.25, 1.05, 0.9]
    tokens = few([x for ratio in following for x in (1.0, ratio)], [advantage] * 6, trajectory=[0, 0, 1, 1, 2, 2])
    row = method(surrogate={"kind": "procedure_clip", "form": form, "half_life": 1e9})
    loss, slope, clipped = loss_and_slope(row, tokens)
    assert loss[::2] == pytest.approx([-advantage * factor for factor in factors])
    assert slope[::2] == pytest.approx(loss[::2])
    assert not any(clipped)


def test_a_blamed_token_is_scaled_as_any_other_up_to_the_safety_ratio_and_not_at_all_above_it() -> None:
    """The cap is applied to what is within [1, 1.2] by then, so that f is 1: never below, wherever the token leads."""
    tokens = few([5.9, 1.0, 6.1, 1.0, 1.5, 0.5, 1.5], [-1.0] * 7, trajectory=[0, 0, 1, 1, 2, 2, 3])
    row = method(
        surrogate={"kind": "procedure_clip", "form": "centred", "half_life": 1e9, "largest_shift": 9.0, "dual": 100.0}
    )
    loss, slope, clipped = loss_and_slope(row, tokens)
    expected = [5.9 * 1.2, 1.0, 6.1, 1.0, 1.5, 0.8, 1.5 * 1.2]
    assert loss == pytest.approx(expected)
    assert slope == pytest.approx([*expected[:5], 0.0, expected[6]])
    assert clipped == [False] * 5 + [True, False]
    praised = replace(tokens, advantage=-tokens.advantage)
    assert loss_and_slope(row, praised)[0][2] == pytest.approx(-1.28 * 1.2)


def test_the_dual_bound_holds_a_loss_and_its_gradient() -> None:
    """A < 0: above ratio 3 the loss is 3 and has no gradient; log 4 is left out of FutureKL, so f is 1; of 2.9 it is 1.2."""
    row = method(surrogate={"kind": "procedure_clip", "form": "centred"})
    loss, slope, clipped = loss_and_slope(row, few([4.0, 1.0, 2.9], [-1.0] * 3, trajectory=[0, 1, 2]))
    assert loss == pytest.approx([3.0, 1.0, 1.2 * 2.9])
    assert slope == pytest.approx([0.0, 1.0, 1.2 * 2.9])
    assert clipped == [True, False, False]


def test_a_trajectory_with_two_dual_clipped_tokens_leaves_the_mean() -> None:
    """The others' coefficients then add up to what all had; one such token does not take its trajectory out."""
    row = method(surrogate={"kind": "procedure_clip", "form": "centred", "half_life": 1e-3})
    tokens = few([4.0, 4.0, 1.0, 4.0, 1.0, 1.0], [-1.0] * 6, trajectory=[0, 0, 0, 1, 1, 2])
    coefficient = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.1, 0.1], dtype=torch.float64)
    tokens = replace(tokens, coefficient=coefficient)
    loss, slope, clipped = loss_and_slope(row, tokens)
    share = 1.0 / 0.4
    assert loss == pytest.approx([0, 0, 0, 3 * share, share, share])
    assert slope == pytest.approx([0, 0, 0, 0, share, share])
    assert clipped == [True, True, True, True, False, False]
    plan = planned(row, tokens)
    assert plan is not None
    assert float((coefficient * plan[:, 0]).sum()) == pytest.approx(float(coefficient.sum()))


def test_a_minibatch_without_a_trainable_token_has_no_loss() -> None:
    assert loss_and_slope(method(surrogate={"kind": "procedure_clip"}), few([], [])) == ([], [], [])


def test_nothing_is_left_if_every_trajectory_leaves_the_mean() -> None:
    row = method(surrogate={"kind": "procedure_clip"})
    loss, slope, clipped = loss_and_slope(row, few([4.0, 4.0], [-1.0, -1.0]))
    assert (loss, slope, clipped) == ([0.0, 0.0], [0.0, 0.0], [True, True])
