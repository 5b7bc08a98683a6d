"""Every slot function against a slow, obvious reference, and the facts that hold whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.filters import group_deviation, reward_variance
from pipeline.objective.gae import gae
from pipeline.objective.group_advantages import group_advantage, to_tokens
from pipeline.objective.methods import (
    coefficients,
    entropy_terms,
    policy_loss,
    select_groups,
    token_advantages,
    token_weights,
)
from pipeline.objective.regularisers import kl_penalty, value_loss
from pipeline.objective.standardise import z_score
from pipeline.objective.surrogates import UpdateTokens, ppo_clip
from pipeline.objective.weights import actfocus_weights, signal_values, uniform_weights
from pipeline.settings.filter import RewardVariance
from pipeline.settings.method import Method
from pipeline.settings.weight import ActFocusWeight
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role
from tests.batches import CLOSE, batches, method, noise, population, properties, section, sigmoid, unbranched

SIGNALS = ("reference_energy", "reference_entropy", "behaviour_nll", "logprob_shift")
AGGREGATIONS: tuple[dict[str, Any], ...] = (
    {"kind": "weight_sum"},
    {"kind": "token_mean"},
    {"kind": "sequence_mean"},
    {"kind": "constant", "tokens": 7.5},
)


BOTH_TERMS = {"kind": "fixed", "entropy": 0.01, "kl": 0.1}


def update_tokens(row: Method, batch: TokenBatch, **columns: torch.Tensor) -> UpdateTokens:
    """The batch's trainable tokens in an update; ``columns`` have an entry per token of the batch, or per trainable one."""
    keep = batch.trainable
    given_columns = {
        "logprob_old": batch.logprob,
        "ref_logprob": batch.ref_logprob,
        "entropy_terms": torch.stack(entropy_terms(row, batch)[0], dim=-1),
        "noise": batch.noise,
        "trajectory": batch.trajectory,
    } | columns
    return UpdateTokens(**{name: c[keep] if len(c) == len(keep) else c for name, c in given_columns.items()})


# ---------------------------------------------------------------------------------------------- S3: advantages


@properties
@given(batches(), st.booleans(), st.sampled_from([0, 1]))
def test_group_advantage_equals_reference(batch: TokenBatch, std: bool, ddof: int) -> None:
    returns, group = batch.returns.tolist(), batch.group.tolist()
    expected = []
    for own, value in zip(group, returns, strict=True):
        members = [r for g, r in zip(group, returns, strict=True) if g == own]
        if len(set(members)) == 1:
            expected.append(0.0)
            continue
        mean, variance = population(members)
        deviation = math.sqrt(variance * len(members) / (len(members) - ddof))
        expected.append((value - mean) / (deviation + 1e-6) if std else value - mean)
    actual = group_advantage(batch.returns, batch.group, std=std, ddof=ddof, eps=1e-6)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    tokens = to_tokens(actual, batch.trajectory, batch.trainable).tolist()
    for token, own in enumerate(batch.trajectory.tolist()):
        assert tokens[token] == (actual[own] if batch.trainable[token] else 0.0)


@pytest.mark.parametrize("std", [True, False])
def test_equal_returns_have_advantage_exactly_zero_in_float32(std: bool) -> None:
    """Eight penalties of -0.1 in all 16 members: their float32 mean is not -0.8."""
    for value in (-0.1, -0.8, 0.7, 1 / 3):
        for members in (1, 2, 3, 11, 16, 31):
            returns = torch.tensor([value] * members + [0.0, 1.0])
            group = torch.tensor([0] * members + [1, 1])
            advantage = group_advantage(returns, group, std=std, ddof=1, eps=1e-6)
            assert advantage[:members].tolist() == [0.0] * members
            assert advantage[-1] > 0 > advantage[-2]


@properties
@given(batches(), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([1.0, 0.8, 0.0]))
def test_gae_equals_sum_of_discounted_deltas(batch: TokenBatch, gamma: float, lam: float) -> None:
    """The definition: A_t = sum_k (gamma lam)^k delta_{t+k}, over a trajectory's trainable tokens as if no others existed."""
    values = noise(batch)
    expected = [0.0] * len(batch.role)
    for trajectory in range(batch.trajectories):
        own = [t for t in range(len(batch.role)) if int(batch.trajectory[t]) == trajectory and bool(batch.trainable[t])]
        v = [float(values[t]) for t in own] + [0.0]
        delta = [float(batch.reward[t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(own)]
        for i, t in enumerate(own):
            expected[t] = math.fsum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(own)))
    actual = gae(batch.reward, values, batch.trainable, batch.trajectory, gamma=gamma, lam=lam)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


@properties
@given(batches())
def test_gae_without_discount_is_return_to_go_minus_value(batch: TokenBatch) -> None:
    values = noise(batch)
    actual = gae(batch.reward, values, batch.trainable, batch.trajectory, gamma=1.0, lam=1.0)
    for t in torch.nonzero(batch.trainable).flatten().tolist():
        same = batch.trajectory == batch.trajectory[t]
        to_go = batch.reward[t:][same[t:]].sum()
        assert float(actual[t]) == pytest.approx(float(to_go - values[t]), abs=1e-9)


def test_gae_refuses_a_reward_on_an_untrainable_token() -> None:
    reward, trainable = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match="reward"):
        gae(reward, torch.zeros(3), trainable, torch.zeros(3, dtype=torch.long), gamma=1.0, lam=1.0)


@properties
@given(batches())
def test_z_score_equals_reference(batch: TokenBatch) -> None:
    advantages = noise(batch)
    chosen = [float(a) for a, t in zip(advantages, batch.trainable, strict=True) if t]
    actual = z_score(advantages, batch.trainable)
    if not chosen:
        return
    mean, variance = population(chosen)
    for a, t, result in zip(advantages.tolist(), batch.trainable.tolist(), actual.tolist(), strict=True):
        assert result == (pytest.approx((a - mean) / math.sqrt(variance + 1e-8), abs=1e-6) if t else 0.0)


@properties
@given(batches())
def test_composed_gae_regresses_on_unwhitened_returns(batch: TokenBatch) -> None:
    slot = {"kind": "gae", "gamma": 0.9, "lam": 0.8, "whiten": True}
    values = noise(batch)
    estimate = token_advantages(method(advantage=slot), batch, {"value": values})
    plain = gae(batch.reward, values, batch.trainable, batch.trajectory, gamma=0.9, lam=0.8)
    assert list(estimate.targets) == ["value"]
    target, mask = estimate.targets["value"]
    assert torch.equal(mask, batch.trainable)
    torch.testing.assert_close(target[batch.trainable], (plain + values)[batch.trainable])
    assert target[~batch.trainable].abs().sum() == 0
    torch.testing.assert_close(estimate.advantage, z_score(plain, batch.trainable))
    unwhitened = token_advantages(method(advantage=slot | {"whiten": False}), batch, {"value": values})
    torch.testing.assert_close(unwhitened.advantage, plain)


def test_gae_without_values_is_refused() -> None:
    batch = golden_batch()
    with pytest.raises(ValueError, match=r"advantage gae needs .*: value"):
        token_advantages(method(advantage={"kind": "gae"}), batch, {})


# ------------------------------------------------------------------------------------------------- S4: weights


def reference_signal(batch: TokenBatch, token: int, signal: str) -> float:
    logprob, ref = float(batch.logprob[token]), float(batch.ref_logprob[token])
    if signal == "reference_energy":
        return float(batch.energy[token])
    if signal == "reference_entropy":
        return float(batch.ref_entropy[token])
    return -logprob if signal == "behaviour_nll" else logprob - ref


def actfocus(batch: TokenBatch, alpha: float, beta: float, tau: float, form: str, signal: str) -> torch.Tensor:
    """The function by the paper's letters."""
    letters = {"reasoning_downweight": alpha, "redistribution_strength": beta, "redistribution_temperature": tau}
    return actfocus_weights(batch, section(ActFocusWeight, **letters, form=form, signal=signal))


def reference_weights(
    batch: TokenBatch,
    alpha: float,
    beta: float,
    tau: float,
    form: str,
    signal: str,
    fixed: tuple[float | None, float, float | None] = (None, 1.0, None),
) -> list[float]:
    """``fixed``: weights of think tags, answer tags and malformed text."""
    think_tag, answer_tag, malformed = fixed
    n = len(batch.role)
    action = [t for t in range(n) if bool(batch.trainable[t]) and int(batch.role[t]) == Role.ACTION]
    x = {t: reference_signal(batch, t, signal) for t in action}
    mean, variance = population(list(x.values())) if x else (0.0, 0.0)
    z = {t: (x[t] - mean) / math.sqrt(variance + 1e-8) / tau for t in action}
    result = []
    for t in range(n):
        if not bool(batch.trainable[t]):
            result.append(0.0)
        elif int(batch.role[t]) == Role.ANSWER_TAG:
            result.append(answer_tag)
        elif int(batch.role[t]) == Role.THINK_TAG and think_tag is not None:
            result.append(think_tag)
        elif int(batch.role[t]) == Role.OTHER and malformed is not None:
            result.append(malformed)
        elif t not in x:
            result.append(alpha)
        elif form == "sigmoid":
            result.append(1 + beta * sigmoid(z[t]))
        else:
            own = [u for u in action if int(batch.trajectory[u]) == int(batch.trajectory[t])]
            share = 1 / math.fsum(math.exp(z[u] - z[t]) for u in own)
            result.append((1 - beta) + beta * len(own) * share)
    return result


@properties
@given(
    batches(),
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from([0.0, 0.1, 1.5]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_actfocus_weights_equal_reference(batch: TokenBatch, form: str, alpha: float, beta: float, tau: float) -> None:
    for signal in SIGNALS:
        actual = actfocus(batch, alpha, beta, tau, form, signal)
        expected = reference_weights(batch, alpha, beta, tau, form, signal)
        torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), **CLOSE)


@properties
@given(batches())
def test_composed_weights_pass_every_setting_on(batch: TokenBatch) -> None:
    slot = {
        "kind": "actfocus",
        "reasoning_downweight": 0.3,
        "redistribution_strength": 0.7,
        "redistribution_temperature": 2.0,
        "form": "softmax",
        "signal": "logprob_shift",
        "think_tag_weight": 0.4,
        "answer_tag_weight": 0.0,
        "malformed_weight": 1.25,
    }
    expected = reference_weights(batch, 0.3, 0.7, 2.0, "softmax", "logprob_shift", (0.4, 0.0, 1.25))
    actual = token_weights(method(weight=slot), batch).double()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


@properties
@given(batches())
def test_signals_are_higher_where_more_weight_shall_go(batch: TokenBatch) -> None:
    for signal in SIGNALS:
        actual = signal_values(batch, signal, batch.of(Role.ACTION)).tolist()
        assert actual == pytest.approx([reference_signal(batch, t, signal) for t in range(len(batch.role))])


@properties
@given(batches())
def test_z_score_has_mean_zero_and_unit_variance_over_the_mask(batch: TokenBatch) -> None:
    mask = batch.of(Role.ACTION, Role.REASONING)
    z = z_score(batch.energy, mask)
    assert z[~mask].abs().sum() == 0
    chosen = z[mask].tolist()
    if len(chosen) > 1:
        mean, variance = population(chosen)
        assert mean == pytest.approx(0, abs=1e-9)
        assert variance == pytest.approx(1, abs=1e-4)
    elif chosen:
        assert chosen == [0.0]


@properties
@given(batches())
def test_role_masks_hold_trainable_tokens_only(batch: TokenBatch) -> None:
    mask = batch.of(Role.THINK_TAG, Role.ACTION).tolist()
    expected = [
        t and r in (Role.THINK_TAG, Role.ACTION)
        for t, r in zip(batch.trainable.tolist(), batch.role.tolist(), strict=True)
    ]
    assert mask == expected


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
@given(batches())
@properties
def test_alpha_one_beta_zero_is_exactly_uniform(form: str, batch: TokenBatch) -> None:
    weights = actfocus(batch, 1.0, 0.0, 1.0, form, "reference_energy")
    uniform = uniform_weights(batch).to(weights.dtype)
    assert torch.equal(weights, uniform)
    if not bool(batch.trainable.any()):
        return
    slot = {"kind": "actfocus", "reasoning_downweight": 1.0, "redistribution_strength": 0.0}
    for aggregation in AGGREGATIONS:
        results = []
        for weight in (slot, {"kind": "uniform"}):
            row = method(weight=weight, aggregation=aggregation, regulariser=BOTH_TERMS)
            results.append(loss_and_gradient(row, batch, token_weights(row, batch).double()))
        assert results[0][0] == results[1][0]
        assert torch.equal(results[0][1], results[1][1])


@properties
@given(batches())
def test_redistribution_temperature_has_the_documented_limits(batch: TokenBatch) -> None:
    action = batch.of(Role.ACTION)
    if not bool(action.any()):
        return
    flat = actfocus(batch, 0.1, 0.5, 1e9, "sigmoid", "reference_energy")[action]
    torch.testing.assert_close(flat, torch.full_like(flat, 1.25), **CLOSE)
    flat = actfocus(batch, 0.1, 0.5, 1e9, "softmax", "reference_energy")[action]
    torch.testing.assert_close(flat, torch.ones_like(flat), **CLOSE)
    hard = actfocus(batch, 0.1, 0.5, 1e-9, "sigmoid", "reference_energy")[action]
    energy = batch.energy[action]
    away = (energy - energy.mean()).abs() > 1e-3
    torch.testing.assert_close(hard[away], torch.where(energy > energy.mean(), 1.5, 1.0).double()[away], **CLOSE)


@properties
@given(batches(), st.sampled_from([0.01, 1.0, 10.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_softmax_form_keeps_each_trajectorys_action_total(batch: TokenBatch, tau: float, beta: float) -> None:
    weights = actfocus(batch, 0.1, beta, tau, "softmax", "reference_entropy")
    action = batch.of(Role.ACTION)
    for trajectory in range(batch.trajectories):
        own = action & (batch.trajectory == trajectory)
        assert float(weights[own].sum()) == pytest.approx(float(own.sum()), abs=1e-6)


@properties
@given(batches())
def test_nothing_outside_trainable_tokens_has_advantage_or_weight(batch: TokenBatch) -> None:
    others = ~batch.trainable
    assert bool(others.any())
    slot = {"kind": "actfocus"}
    for advantage in ({"kind": "group"}, {"kind": "gae"}, {"kind": "gae", "whiten": False}):
        row = method(advantage=advantage, weight=slot)
        assert token_advantages(row, batch, {"value": noise(batch)}).advantage[others].abs().sum() == 0
        weights = token_weights(row, batch)
        assert weights[others].abs().sum() == 0
        for aggregation in AGGREGATIONS:
            factors = coefficients(method(aggregation=aggregation), weights, batch.trainable, batch.trajectory)
            assert factors[others].abs().sum() == 0
    assert uniform_weights(batch)[others].abs().sum() == 0


# --------------------------------------------------------------------------------------------- S4: aggregation


@properties
@given(batches(), st.sampled_from(AGGREGATIONS))
def test_coefficients_equal_reference(batch: TokenBatch, aggregation: dict[str, Any]) -> None:
    weights = torch.where(batch.trainable, noise(batch).abs(), 0.0)
    weights = torch.where(batch.trajectory == 0, 0.0, weights)  # a trajectory without any weight
    w, owner = weights.tolist(), batch.trajectory.tolist()
    totals = {k: math.fsum(x for x, o in zip(w, owner, strict=True) if o == k) for k in set(owner)}
    alive = sum(total > 0 for total in totals.values())
    expected = []
    for x, own in zip(w, owner, strict=True):
        if x == 0:
            expected.append(0.0)
        elif aggregation["kind"] == "weight_sum":
            expected.append(x / math.fsum(w))
        elif aggregation["kind"] == "token_mean":
            expected.append(x / sum(batch.trainable.tolist()))
        elif aggregation["kind"] == "constant":
            expected.append(
                x
                / (len({o for o, t in zip(owner, batch.trainable.tolist(), strict=True) if t}) * aggregation["tokens"])
            )
        else:
            expected.append(x / totals[own] / alive)
    actual = coefficients(method(aggregation=aggregation), weights, batch.trainable, batch.trajectory)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


@properties
@given(batches(), st.sampled_from([1e-3, 0.5, 7.0]))
def test_loss_is_unchanged_when_all_weights_are_scaled(batch: TokenBatch, factor: float) -> None:
    if not bool(batch.trainable.any()):
        return
    row = method(weight={"kind": "actfocus"})
    weights = token_weights(row, batch).double()
    loss, gradient = loss_and_gradient(row, batch, weights)
    scaled_loss, scaled_gradient = loss_and_gradient(row, batch, factor * weights)
    assert scaled_loss == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(scaled_gradient, gradient)


def test_no_weight_at_all_gives_zeros_not_nan() -> None:
    batch = golden_batch()
    for aggregation in AGGREGATIONS:
        row = method(aggregation=aggregation)
        actual = coefficients(row, torch.zeros(len(batch.role)), batch.trainable, batch.trajectory)
        assert actual.tolist() == [0.0] * len(batch.role)


@properties
@given(batches(), st.sampled_from(AGGREGATIONS))
def test_counting_tokens_with_an_advantage_is_training_without_the_others(
    batch: TokenBatch, aggregation: dict[str, Any]
) -> None:
    """The surrogate is that of the tokens with an advantage alone, in loops; with all of them it is smaller, or the same."""
    row = method(aggregation={**aggregation, "count": "with_advantage"})
    advantage = token_advantages(row, batch, {}).advantage
    weights = torch.where(batch.trainable, noise(batch).abs(), 0.0)
    trainable, owner = batch.trainable.tolist(), batch.trajectory.tolist()
    counted = [t for t, a in enumerate(advantage.tolist()) if trainable[t] and a != 0]
    w = {t: float(weights[t]) for t in counted}
    owners = {own: math.fsum(w[t] for t in counted if owner[t] == own) for own in {owner[t] for t in counted}}
    expected = [0.0] * len(owner)
    for t in counted:
        expected[t] = {
            "weight_sum": lambda t: w[t] / math.fsum(w.values()),
            "token_mean": lambda t: w[t] / len(counted),
            "sequence_mean": lambda t: w[t] / owners[owner[t]] / len(owners),
            "constant": lambda t: w[t] / len(owners) / 7.5,
        }[aggregation["kind"]](t)
    actual = coefficients(row, weights, batch.trainable, batch.trajectory, advantage)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    everything = coefficients(method(aggregation=aggregation), weights, batch.trainable, batch.trajectory)
    assert bool((everything[counted] <= actual[counted] * (1 + 1e-9)).all())
    if len(counted) == len(w) == sum(trainable):
        torch.testing.assert_close(actual, everything, rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda aggregation: aggregation["kind"])
def test_a_group_of_equal_returns_neither_dilutes_the_surrogate_nor_leaves_the_kl(aggregation: dict[str, Any]) -> None:
    """Half of the tokens are of a group without variance: they halve the surrogate only where all are counted."""
    four, n = torch.arange(4).repeat_interleave(3), 12
    alone = replace(golden_batch(), **flat_columns(torch.arange(2).repeat_interleave(3), [1.0, 0.0], [0, 0]))
    both = replace(golden_batch(), **flat_columns(four, [1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]))
    still = replace(golden_batch(), **flat_columns(four, [1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1]))
    losses = {}
    for count in ("all", "with_advantage"):
        row = method(aggregation={**aggregation, "count": count}, regulariser=BOTH_TERMS)
        for name, batch in (("alone", alone), ("both", both), ("still", still)):
            m = len(batch.role)
            advantage = token_advantages(row, batch, {}).advantage
            factors = coefficients(row, torch.ones(m).double(), batch.trainable, batch.trajectory, advantage)
            logprob = torch.linspace(-0.2, 0.3, n).double()[:m].requires_grad_(True)
            columns = {"logprob": logprob, "entropy": torch.ones(m).double(), "advantage": advantage}
            tokens = update_tokens(row, batch, coefficient=factors, **columns)
            losses[name, count] = policy_loss(row, tokens, None, m)
            (gradient,) = torch.autograd.grad(losses[name, count].total, logprob)
            assert bool(gradient.isfinite().all())
    surrogate = {key: parts.surrogate.item() for key, parts in losses.items()}
    assert surrogate["both", "with_advantage"] == pytest.approx(surrogate["alone", "all"], rel=1e-12)
    assert surrogate["both", "all"] == pytest.approx(surrogate["alone", "all"] / 2, rel=1e-12)
    assert surrogate["still", "with_advantage"] == surrogate["still", "all"] == 0
    for term in ("entropy", "kl", "moved"):
        assert getattr(losses["both", "with_advantage"], term) == getattr(losses["both", "all"], term)
    assert losses["still", "with_advantage"].kl > 0


def flat_columns(trajectory: torch.Tensor, returns: Sequence[float], group: Sequence[int]) -> dict[str, torch.Tensor]:
    """Columns of a float64 batch of one turn per trajectory in which every token is trainable."""
    zeros = torch.zeros(len(trajectory), dtype=torch.float64)
    return {
        "role": torch.full_like(trajectory, int(Role.ACTION)),
        "trainable": torch.ones_like(trajectory, dtype=torch.bool),
        "trajectory": trajectory,
        "group": torch.tensor(group),
        "success": torch.tensor(returns) > 0,
        "returns": torch.tensor(returns, dtype=torch.float64),
        "turn": trajectory,
        "turn_trajectory": torch.arange(len(returns)),
        "turn_state": torch.arange(len(returns)),
        **dict.fromkeys(("reward", "logprob", "ref_logprob", "entropy", "ref_entropy", "energy", "noise"), zeros),
        **unbranched(len(returns)),
    }


def test_counting_tokens_with_an_advantage_needs_the_advantages() -> None:
    batch, row = golden_batch(), method(aggregation={"kind": "weight_sum", "count": "with_advantage"})
    with pytest.raises(ValueError, match="needs the advantages"):
        coefficients(row, batch.trainable.float(), batch.trainable, batch.trajectory)


# --------------------------------------------------------------------------------------- S5 and S6: token losses


def reference_surrogate(logprob: float, old: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """Loss and its derivative by log pi: 0 where the bound is what the minimum takes."""
    ratio = math.exp(logprob - old)
    held = min(max(ratio, 1 - low), 1 + high)
    if held * advantage < ratio * advantage:
        return -held * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def reference_kl(logprob: float, ref: float, estimator: str) -> tuple[float, float]:
    """Estimate and its derivative by log pi."""
    d = logprob - ref
    if estimator == "k1":
        return d, 1.0
    if estimator == "k2":
        return d * d / 2, d
    return math.exp(-d) - 1 + d, 1 - math.exp(-d)


@properties
@given(batches())
def test_ppo_clip_equals_reference_with_gradient(batch: TokenBatch) -> None:
    logprob = (batch.logprob + 0.5 * noise(batch, 1)).requires_grad_(True)
    advantage = noise(batch, 2)
    loss, clipped = ppo_clip(logprob, batch.logprob, advantage, low=0.2, high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    now = logprob.tolist()
    for t in range(len(batch.role)):
        value, slope = reference_surrogate(now[t], float(batch.logprob[t]), float(advantage[t]), 0.2, 0.28)
        assert float(loss[t].detach()) == pytest.approx(value, abs=1e-6)
        assert float(gradient[t]) == pytest.approx(slope, abs=1e-6)
        assert bool(clipped[t]) == (slope == 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_clip_golden(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    result = ppo_clip(logprob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), low=0.2, high=0.2)
    (actual,) = torch.autograd.grad(result.loss.sum(), logprob)
    assert result.loss.item() == pytest.approx(loss)
    assert actual.item() == pytest.approx(gradient)


@properties
@given(batches(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimators_equal_reference_with_gradient(batch: TokenBatch, estimator: str) -> None:
    logprob = batch.logprob.clone().requires_grad_(True)
    loss = kl_penalty(logprob, batch.ref_logprob, estimator)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    now = logprob.tolist()
    for t in range(len(batch.role)):
        value, slope = reference_kl(now[t], float(batch.ref_logprob[t]), estimator)
        assert float(loss[t].detach()) == pytest.approx(value, abs=1e-6)
        assert float(gradient[t]) == pytest.approx(slope, abs=1e-6)


def expected_gradient(estimator: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact expectation, over the policy's own samples, of an estimator's gradient; and the two KLs' gradients."""
    theta = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.9, -1.2], dtype=torch.float64), -1)
    logprob = torch.log_softmax(theta, -1)
    probability = logprob.exp()
    loss = (probability.detach() * kl_penalty(logprob, reference, estimator)).sum()
    forward = (probability * (logprob - reference)).sum()
    backward = (reference.exp() * (reference - logprob)).sum()
    return tuple(torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (loss, forward, backward))


def test_k1_as_a_loss_has_no_expected_gradient() -> None:
    gradient, forward, _ = expected_gradient("k1")
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert forward.abs().max() > 0.01


def test_k2_as_a_loss_has_the_gradient_of_the_kl() -> None:
    gradient, forward, _ = expected_gradient("k2")
    torch.testing.assert_close(gradient, forward)


def test_k3_as_a_loss_has_the_gradient_of_the_reverse_kl() -> None:
    gradient, forward, backward = expected_gradient("k3")
    torch.testing.assert_close(gradient, backward)
    assert gradient.abs().max() > 0.01
    assert not torch.allclose(gradient, forward, atol=1e-2)


@pytest.mark.parametrize(("estimator", "forward"), [("k2", True), ("k3", False)])
def test_a_methods_kl_term_pulls_by_the_kl_that_its_estimator_is_said_to(estimator: str, forward: bool) -> None:
    """Against finite differences of both KLs, on samples in exactly the policy's shares: 1, 2, 3 and 4 of 10 tokens."""
    counts = torch.tensor([1, 2, 3, 4])
    samples = torch.repeat_interleave(torch.arange(4), counts)
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.9, -1.2], dtype=torch.float64), -1)
    row = method(regulariser={"kind": "fixed", "kl": 1.0, "kl_estimator": estimator})
    batch = replace(golden_batch(), **flat_columns(torch.zeros(10, dtype=torch.long), [0.0], [0]))
    theta = (counts / 10).double().log().requires_grad_(True)
    logprob = torch.log_softmax(theta, -1)[samples]
    columns = {"logprob": logprob, "ref_logprob": reference[samples], "logprob_old": logprob.detach()}
    zeros = torch.zeros(10, dtype=torch.float64)
    tokens = update_tokens(row, batch, entropy=zeros, advantage=zeros, coefficient=zeros, **columns)
    (gradient,) = torch.autograd.grad(policy_loss(row, tokens, None, 10).total, theta)

    def divergence(logits: torch.Tensor) -> float:
        pi = torch.log_softmax(logits, -1)
        of, against = (pi, reference) if forward else (reference, pi)
        return float((of.exp() * (of - against)).sum())

    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    slopes = [(divergence(theta.detach() + step) - divergence(theta.detach() - step)) / 2e-5 for step in steps]
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-8)
    assert max(map(abs, slopes)) > 0.05


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_kl_estimators_are_unbiased_where_they_say_so(estimator: str, unbiased: bool) -> None:
    logprob = torch.log_softmax(torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64), -1)
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.9], dtype=torch.float64), -1)
    estimate = (logprob.exp() * kl_penalty(logprob, reference, estimator)).sum()
    exact = (logprob.exp() * (logprob - reference)).sum()
    assert bool(torch.isclose(estimate, exact)) == unbiased


@properties
@given(batches(), st.sampled_from([None, 0.2, 1.0]))
def test_value_loss_equals_reference(batch: TokenBatch, clip: float | None) -> None:
    values, old, target = (noise(batch, seed) for seed in range(3))
    actual = value_loss(values, old, target, clip).tolist()
    for v, o, r, result in zip(values.tolist(), old.tolist(), target.tolist(), actual, strict=True):
        expected = 0.5 * (v - r) ** 2
        if clip is not None:
            held = o + min(max(v - o, -clip), clip)
            expected = max(expected, 0.5 * (held - r) ** 2)
        assert result == pytest.approx(expected, abs=1e-6)


def loss_and_gradient(row: Method, batch: TokenBatch, weights: torch.Tensor) -> tuple[float, torch.Tensor]:
    """A method's loss on a batch with some new policy, as in training: on the trainable tokens."""
    keep = batch.trainable
    logprob = (batch.logprob + 0.4 * noise(batch, 3))[keep].requires_grad_(True)
    tokens = update_tokens(
        row,
        batch,
        logprob=logprob,
        entropy=noise(batch, 4).abs(),
        advantage=token_advantages(row, batch, {"value": noise(batch, 5)}).advantage,
        coefficient=coefficients(row, weights, batch.trainable, batch.trajectory),
    )
    parts = policy_loss(row, tokens, None, int(keep.sum()))
    (gradient,) = torch.autograd.grad(parts.total, logprob)
    return float(parts.total.detach()), gradient


@properties
@given(batches(), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from([0.0, 0.03]), st.sampled_from([0.0, 0.2]))
def test_policy_loss_equals_reference_with_gradients(
    batch: TokenBatch, estimator: str, bonus: float, kl: float
) -> None:
    keep = batch.trainable
    tokens = int(keep.sum())
    if tokens == 0:
        return
    estimator = estimator if kl else "k3"  # another estimator of nothing is refused
    row = method(regulariser={"kind": "fixed", "entropy": bonus, "kl": kl, "kl_estimator": estimator})
    logprob = (batch.logprob + 0.4 * noise(batch, 3))[keep].requires_grad_(True)
    entropy = noise(batch, 4)[keep].abs().requires_grad_(True)
    old, ref = batch.logprob[keep], batch.ref_logprob[keep]
    advantage, factor = noise(batch, 5)[keep], noise(batch, 6)[keep].abs()
    columns = {"logprob": logprob, "entropy": entropy, "advantage": advantage, "coefficient": factor}
    parts = policy_loss(row, update_tokens(row, batch, **columns), None, tokens)
    surrogate = penalty = clipped = moved = 0.0
    slopes = []
    now = logprob.tolist()
    for t in range(tokens):
        value, slope = reference_surrogate(now[t], float(old[t]), float(advantage[t]), 0.2, 0.28)
        extra, extra_slope = reference_kl(now[t], float(ref[t]), estimator)
        surrogate += float(factor[t]) * value
        penalty += extra / tokens
        clipped += (slope == 0.0) / tokens
        moved += reference_kl(float(old[t]), now[t], "k3")[0] / tokens
        slopes.append(float(factor[t]) * slope + kl * extra_slope / tokens)
    mean_entropy = math.fsum(entropy.tolist()) / tokens
    assert parts.surrogate.item() == pytest.approx(surrogate, abs=1e-6)
    assert parts.kl.item() == pytest.approx(penalty, abs=1e-6)
    assert parts.entropy.item() == pytest.approx(mean_entropy, abs=1e-6)
    assert parts.clipped.item() == pytest.approx(clipped, abs=1e-6)
    assert parts.moved.item() == pytest.approx(moved, abs=1e-6)
    assert parts.total.item() == pytest.approx(surrogate - bonus * mean_entropy + kl * penalty, abs=1e-6)
    gradient, entropy_gradient = torch.autograd.grad(parts.total, (logprob, entropy), allow_unused=True)
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-6)
    assert (0.0 if entropy_gradient is None else entropy_gradient[0].item()) == pytest.approx(-bonus / tokens, abs=1e-9)


@properties
@given(batches())
def test_pieces_of_a_minibatch_add_up_to_it(batch: TokenBatch) -> None:
    """Coefficients and token counts belong to the minibatch, so memory-bounded pieces change nothing."""
    keep = torch.nonzero(batch.trainable).flatten()
    if len(keep) < 2:
        return
    row = method(regulariser=BOTH_TERMS)
    columns = {
        "logprob": batch.logprob + 0.4 * noise(batch, 1),
        "entropy": noise(batch, 2).abs(),
        "advantage": noise(batch, 3),
        "coefficient": noise(batch, 4).abs(),
    }
    everything = update_tokens(row, batch, **columns)
    whole = policy_loss(row, everything, None, len(keep))
    halves = []
    for part in torch.arange(len(keep)).split(2):
        named = {f.name: getattr(everything, f.name) for f in fields(everything)}
        piece = UpdateTokens(**{name: None if c is None else c[part] for name, c in named.items()})
        halves.append(policy_loss(row, piece, None, len(keep)))
    for term in range(len(whole)):
        assert sum(float(half[term]) for half in halves) == pytest.approx(float(whole[term]), abs=1e-6)


# ------------------------------------------------------------------------------------------------- S2: filters


def ended(returns: torch.Tensor, group: torch.Tensor) -> TokenBatch:
    """A batch of which a filter looks at the returns and the groups."""
    columns = flat_columns(torch.arange(len(group)), returns.tolist(), group.tolist())
    return replace(golden_batch(), **columns | {"returns": returns})


@properties
@given(batches(), st.sampled_from([0.25, 0.5, 1.0]))
def test_reward_variance_keeps_the_most_varied_groups(batch: TokenBatch, keep: float) -> None:
    returns, group = batch.returns.tolist(), batch.group.tolist()
    members = {g: [r for r, own in zip(returns, group, strict=True) if own == g] for g in sorted(set(group))}
    deviation = {g: math.sqrt(population(rs)[1]) if len(set(rs)) > 1 else 0.0 for g, rs in members.items()}
    room = math.ceil(keep * len(members))
    chosen = sorted(members, key=lambda g: (-round(deviation[g], 12), g))[:room]
    expected = [g in chosen and deviation[g] > 0 for g in group]
    assert reward_variance(batch, section(RewardVariance, keep=keep)).tolist() == expected
    row = method(filter={"kind": "reward_variance", "keep": keep})
    assert select_groups(row, batch).tolist() == expected
    assert group_deviation(batch.returns, batch.group).tolist() == pytest.approx(list(deviation.values()), abs=1e-9)


def test_share_of_groups_is_not_rounded_up_by_float_error() -> None:
    """0.28 * 25 is 7.000000000000001 in floats."""
    returns, group = torch.tensor([0.0, 1.0] * 25), torch.arange(25).repeat_interleave(2)
    for keep, groups in ((0.28, 7), (0.29, 8), (0.56, 14), (1.0, 25), (1e-12, 1)):
        assert int(reward_variance(ended(returns, group), section(RewardVariance, keep=keep)).sum()) == 2 * groups


def test_groups_of_equal_returns_are_dropped_even_where_float_variance_is_not_zero() -> None:
    returns = torch.tensor([-0.1] * 11 + [-0.8] * 16)
    group = torch.tensor([0] * 11 + [1] * 16)
    assert not reward_variance(ended(returns, group), section(RewardVariance, keep=1.0)).any()
    assert select_groups(method(), ended(returns, group)).all()


def test_tied_groups_are_kept_from_the_first() -> None:
    returns, group = torch.tensor([0.0, 1.0] * 4), torch.arange(4).repeat_interleave(2)
    assert (
        reward_variance(ended(returns, group), section(RewardVariance, keep=0.5)).tolist() == [True] * 4 + [False] * 4
    )


# ------------------------------------------------------------------------------------------------ golden values


def golden_batch() -> TokenBatch:
    """One trajectory: prompt, <think>, one word, <answer>, two action tokens, </answer>."""
    roles = [Role.PROMPT, Role.THINK_TAG, Role.REASONING, Role.ANSWER_TAG, Role.ACTION, Role.ACTION, Role.ANSWER_TAG]
    zeros = torch.zeros(7, dtype=torch.float64)
    return TokenBatch(
        role=torch.tensor([int(role) for role in roles]),
        trainable=torch.tensor([False] + [True] * 6),
        trajectory=torch.zeros(7, dtype=torch.long),
        turn=torch.tensor([-1] + [0] * 6),
        turn_trajectory=torch.tensor([0]),
        turn_state=torch.tensor([0]),
        group=torch.tensor([0]),
        success=torch.tensor([True]),
        returns=torch.tensor([1.0], dtype=torch.float64),
        reward=torch.tensor([0.0] * 6 + [1.0], dtype=torch.float64),
        logprob=zeros,
        entropy=zeros,
        energy=torch.tensor([0.0, -9.0, -9.0, -9.0, -3.0, -1.0, -9.0], dtype=torch.float64),
        ref_logprob=zeros,
        ref_entropy=zeros,
        noise=zeros,
        **unbranched(1),
    )


def test_golden_actfocus_loss() -> None:
    """By hand. Action energies -3 and -1: mean -2, deviation 1, z = -1 and 1.

    sigmoid(-1) = 0.26894142, sigmoid(1) = 0.73105858, so with alpha 0.1 and beta 0.5 the weights are
    0, 0.1, 0.1, 1, 1.13447071, 1.36552929, 1, which sum to 4.7. All advantages are 2. Ratios are 1, except
    0.5 at the reasoning token (below the band, A > 0: not held) and 1.5 at the first action token (held at 1.28):

    L = -2 / 4.7 * (0.1 * 1 + 0.1 * 0.5 + 1 * 1 + 1.13447071 * 1.28 + 1.36552929 * 1 + 1 * 1)
      = -2 / 4.7 * 4.96765180 = -2.11389438

    The gradient by log pi is -w A r / 4.7, and 0 at the held token.
    """
    batch = golden_batch()
    row = method(weight={"kind": "actfocus", "reasoning_downweight": 0.1, "redistribution_strength": 0.5})
    weights = token_weights(row, batch)
    assert weights.tolist() == pytest.approx([0, 0.1, 0.1, 1, 1.13447071, 1.36552929, 1], abs=1e-7)
    logprob = torch.tensor([0, 0, math.log(0.5), 0, math.log(1.5), 0, 0], dtype=torch.float64, requires_grad=True)
    tokens = update_tokens(
        row,
        batch,
        logprob=logprob,
        entropy=torch.zeros(7),
        advantage=torch.tensor([0.0] + [2.0] * 6),
        coefficient=coefficients(row, weights, batch.trainable, batch.trajectory),
    )
    parts = policy_loss(row, tokens, None, 6)
    assert parts.total.item() == pytest.approx(-2.11389438, abs=1e-7)
    (gradient,) = torch.autograd.grad(parts.total, logprob)
    expected = [0, -0.2 / 4.7, -0.1 / 4.7, -2 / 4.7, 0, -2.73105858 / 4.7, -2 / 4.7]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-7)
    assert parts.clipped.item() == pytest.approx(1 / 6)


def test_golden_softmax_weights() -> None:
    """softmax(-1, 1) = 0.11920292, 0.88079708; times 2 tokens, half of it added to one half."""
    batch = golden_batch()
    weights = actfocus(batch, 0.1, 0.5, 1.0, "softmax", "reference_energy")
    assert weights.tolist() == pytest.approx([0, 0.1, 0.1, 1, 0.61920292, 1.38079708, 1], abs=1e-7)


def test_golden_group_advantage() -> None:
    """Returns 1, 0, 0, 0: mean 1/4, sample deviation 1/2; population deviation sqrt(3)/4."""
    returns, group = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    sample = group_advantage(returns, group, std=True, ddof=1, eps=1e-6)
    assert sample.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    whole = group_advantage(returns, group, std=True, ddof=0, eps=1e-6)
    assert whole[0].item() == pytest.approx(math.sqrt(3), abs=1e-5)


# ------------------------------------------------------------------------------------------ from trajectories


def test_token_batch_reads_trajectories_and_refuses_unannotated_ones() -> None:
    builder = EpisodeBuilder(
        episode_id="e", group_id="g", environment="x", state_key="s", seed=0, iteration=0, policy_version=0
    )
    builder.append_text([1, 2], Role.PROMPT)
    start = len(builder)
    builder.append_text([3], Role.THINK_TAG)
    builder.append_sampled([4, 5], [Role.ACTION, Role.ANSWER_TAG], [-0.5, -0.25], [1.0, 2.0])
    builder.close_turn(start, 1.0, "Left", True, "s")
    builder.finish(True, "goal")
    plain = build([builder])
    with pytest.raises(ValueError, match="annotated"):
        token_batch(plain, np.random.default_rng(0))
    column = np.arange(5, dtype=np.float32)
    annotated = replace(plain, energy=-column, ref_logprob=-2 * column, ref_entropy=3 * column)
    batch = token_batch(annotated, np.random.default_rng(0), 7)
    assert batch.trainable.tolist() == [False, False, False, True, True]
    assert batch.role.tolist() == [Role.PROMPT, Role.PROMPT, Role.THINK_TAG, Role.ACTION, Role.ANSWER_TAG]
    assert batch.reward.tolist() == [0, 0, 0, 0, 1]
    assert batch.logprob.tolist() == [0, 0, 0, -0.5, -0.25]
    assert batch.energy.tolist() == [0, -1, -2, -3, -4]
    assert batch.ref_logprob.tolist() == [0, -2, -4, -6, -8]
    assert batch.ref_entropy.tolist() == [0, 3, 6, 9, 12]
    assert (batch.trajectory.tolist(), batch.group.tolist(), batch.returns.tolist()) == ([0] * 5, [0], [1.0])
    assert batch.entropy.tolist() == [0, 0, 0, 1, 2]
    assert (batch.turn.tolist(), batch.turn_trajectory.tolist()) == ([-1, -1, 0, 0, 0], [0])
    assert (batch.turn_state.tolist(), batch.success.tolist(), batch.iteration) == ([0], [True], 7)
    again, other = (token_batch(annotated, np.random.default_rng(seed)).noise for seed in (0, 1))
    assert torch.equal(batch.noise, again)
    assert not torch.equal(batch.noise, other)
    assert len(set(again.tolist())) == 5
    assert bool(((again >= 0) & (again < 1)).all())


def test_turns_share_a_state_where_group_and_state_key_are_equal() -> None:
    """Three episodes: two of a group, both through "s"; one of another group, which begins in "s" too."""
    builders = []
    for name, group, keys in (("a", "g", ("s", "t")), ("b", "g", ("t", "u", "s")), ("c", "h", ("s",))):
        builder = EpisodeBuilder(
            episode_id=name, group_id=group, environment="x", state_key=keys[0], seed=0, iteration=0, policy_version=0
        )
        for number, key in enumerate(keys):
            builder.append_text([1], Role.OBSERVATION if number else Role.PROMPT)
            start = len(builder)
            builder.append_sampled([4], [Role.ACTION], [-0.5], [1.0])
            builder.close_turn(start, 0.25, "Left", True, key)
        builder.finish(name == "b", "goal")
        builders.append(builder)
    plain = build(builders)
    column = np.zeros(12, dtype=np.float32)
    annotated = replace(plain, energy=column, ref_logprob=column, ref_entropy=column)
    batch = token_batch(annotated, np.random.default_rng(0))
    assert batch.turn_trajectory.tolist() == [0, 0, 1, 1, 1, 2]
    s_here, t_here, again_t, u_here, again_s, s_there = batch.turn_state.tolist()
    assert (again_t, again_s) == (t_here, s_here)
    assert len({s_here, t_here, u_here, s_there}) == 4
    assert batch.turn.tolist() == [-1, 0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5]
    assert batch.success.tolist() == [False, True, False]
    assert batch.returns.tolist() == [0.5, 0.75, 0.25]
    assert batch.reward.tolist() == [0, 0.25] * 6
