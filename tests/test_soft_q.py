"""ETPO's soft values and its policy loss against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.methods import (
    surrogate_loss,
)
from pipeline.objective.soft import soft_policy_loss, soft_state
from tests.batches import properties
from tests.surrogate_references import few, row_of


def test_soft_q_without_a_q_function_is_refused() -> None:
    row = row_of("soft_q")
    with pytest.raises(ValueError, match="Q function"):
        surrogate_loss(row, few([1.0], [1.0]), None)


def distribution(logits: list[float], temperature: float) -> list[float]:
    """Probabilities of the tempered logits, of which some may be -inf."""
    peak = max(logits)
    grown = [0.0 if x == -math.inf else math.exp((x - peak) / temperature) for x in logits]
    return [x / math.fsum(grown) for x in grown]


Soft = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


DOUBLE = {"rel": 1e-6, "abs": 1e-9}


@st.composite
def vocabularies(draw: st.DrawFn) -> Soft:
    """Logits of a policy and a reference, and Q, of a few positions; what the reference cannot say the policy cannot."""
    positions, size = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits, ref, q = (torch.from_numpy(numbers.standard_normal((positions, size))) for _ in range(3))
    if draw(st.booleans()):
        logits[:, 1] = -torch.inf
        if draw(st.booleans()):
            ref[0, 1] = -torch.inf
    return logits.requires_grad_(True), ref, q.requires_grad_(True)


@properties
@given(vocabularies(), st.sampled_from([0.5, 1.0, 2.0]))
def test_soft_state_equals_reference(soft: Soft, temperature: float) -> None:
    logits, ref, q = soft
    actual = soft_state(logits, ref, q, temperature)
    values, kls = [], []
    for own, other, row in zip(logits.tolist(), ref.tolist(), q.tolist(), strict=True):
        pi, base = distribution(own, temperature), distribution(other, temperature)
        value = kl = 0.0
        for v in range(len(pi)):
            value += pi[v] * row[v]
            if pi[v] > 0:
                kl += pi[v] * math.log(pi[v] / base[v])
        values.append(value)
        kls.append(kl)
    assert actual.value.tolist() == pytest.approx(values, **DOUBLE)
    assert actual.kl.tolist() == pytest.approx(kls, **DOUBLE)


@properties
@given(vocabularies(), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.01, 1.0]))
def test_soft_policy_loss_equals_reference_with_gradient(soft: Soft, temperature: float, weight: float) -> None:
    """d/dx_u sum_v pi_v f_v = pi_u (f_u - sum_v pi_v f_v) / T, as the derivative of f itself sums to nothing."""
    logits, ref, q = soft
    loss = soft_policy_loss(logits, ref, q, temperature, weight)
    slope, to_q = torch.autograd.grad(loss.sum(), (logits, q), allow_unused=True)
    assert to_q is None
    for position, (own, other, row) in enumerate(zip(logits.tolist(), ref.tolist(), q.tolist(), strict=True)):
        pi, base = distribution(own, temperature), distribution(other, temperature)
        each = [weight * math.log(p / b) - x if p > 0 else 0.0 for p, b, x in zip(pi, base, row, strict=True)]
        total = math.fsum(p * x for p, x in zip(pi, each, strict=True))
        expected = [p * (x - total) / temperature for p, x in zip(pi, each, strict=True)]
        assert float(loss[position].detach()) == pytest.approx(total, **DOUBLE)
        assert slope[position].tolist() == pytest.approx(expected, **DOUBLE)


def test_soft_policy_loss_is_least_where_the_policy_is_the_reference_tilted_by_q() -> None:
    """pi = ref exp(Q / b), normalised, where the loss is -b log sum_v ref(v) exp(Q(v) / b)."""
    ref, q = torch.tensor([[0.3, -1.0, 0.8]]), torch.tensor([[0.2, 0.5, -0.4]])
    best = (torch.log_softmax(ref, -1) + q / 0.5).requires_grad_(True)
    loss = soft_policy_loss(best, ref, q, 1.0, 0.5)
    (slope,) = torch.autograd.grad(loss.sum(), best)
    torch.testing.assert_close(slope, torch.zeros(1, 3), atol=1e-6, rtol=0)
    optimum = -0.5 * math.log(float((torch.softmax(ref, -1) * (q / 0.5).exp()).sum()))
    assert loss.item() == pytest.approx(optimum, abs=1e-6)
    moved = best.detach() + torch.tensor([[0.3, 0.0, -0.1]])
    assert soft_policy_loss(moved, ref, q, 1.0, 0.5).item() > loss.item() + 1e-3
