"""Surrogates and regularisers against slow references: losses of tokens, penalties, and a method's whole loss."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    policy_loss,
)
from pipeline.objective.regularisers import kl_penalty, value_loss
from pipeline.objective.surrogates import UpdateTokens, ppo_clip
from tests.batches import batches, method, noise, properties
from tests.objective_cases import BOTH_TERMS, flat_columns, golden_batch, update_tokens


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
