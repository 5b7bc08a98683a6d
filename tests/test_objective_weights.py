"""Against slow references: token weights, and the factors that aggregation makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    coefficients,
    policy_loss,
    token_advantages,
    token_weights,
)
from pipeline.objective.standardise import z_score
from pipeline.objective.weights import signal_values, uniform_weights
from pipeline.settings.method import Method
from pipeline.trajectories.trajectory import Role
from tests.batches import CLOSE, batches, method, noise, population, properties, sigmoid
from tests.objective_cases import BOTH_TERMS, actfocus, flat_columns, golden_batch, update_tokens

SIGNALS = ("reference_energy", "reference_entropy", "behaviour_nll", "logprob_shift")


AGGREGATIONS: tuple[dict[str, Any], ...] = (
    {"kind": "weight_sum"},
    {"kind": "token_mean"},
    {"kind": "sequence_mean"},
    {"kind": "constant", "tokens": 7.5},
)


# ------------------------------------------------------------------------------------------------- weights


def reference_signal(batch: TokenBatch, token: int, signal: str) -> float:
    logprob, ref = float(batch.logprob[token]), float(batch.ref_logprob[token])
    if signal == "reference_energy":
        return float(batch.energy[token])
    if signal == "reference_entropy":
        return float(batch.ref_entropy[token])
    return -logprob if signal == "behaviour_nll" else logprob - ref


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


# --------------------------------------------------------------------------------------------- aggregation


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


def test_counting_tokens_with_an_advantage_needs_the_advantages() -> None:
    batch, row = golden_batch(), method(aggregation={"kind": "weight_sum", "count": "with_advantage"})
    with pytest.raises(ValueError, match="needs the advantages"):
        coefficients(row, batch.trainable.float(), batch.trainable, batch.trajectory)


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
