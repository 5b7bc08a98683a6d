"""Surrogates, their plans and the policy's whole loss against slow, obvious references, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    REGULARISERS,
    SURROGATES,
    policy_loss,
    surrogate_loss,
)
from pipeline.objective.surrogates import (
    UpdateTokens,
    ppo_clip,
)
from tests.batches import CLOSE, batches, method, properties
from tests.surrogate_references import (
    REGULARISER_ROWS,
    SURROGATE_ROWS,
    Given,
    clip_one,
    covariances,
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

Expected = tuple[list[float], list[float], list[bool]]
"""Loss, derivative by log pi, clipped."""


def columns_of(rows: list[tuple[float, float, bool]]) -> Expected:
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def expect_ppo(g: Given) -> Expected:
    pairs = zip(g.now, g.old, g.advantage, strict=True)
    return columns_of([clip_one(math.exp(n - o), a, 0.8, 1.28) for n, o, a in pairs])


def expect_sequence(g: Given) -> Expected:
    """With one ratio per trajectory; the derivative of a token's own log pi under its sequence's ratio."""
    rows = []
    for t in range(len(g.now)):
        own = [u for u in range(len(g.now)) if g.trajectory[u] == g.trajectory[t]]
        ratio = math.exp(math.fsum(g.now[u] - g.old[u] for u in own) / len(own))
        rows.append(clip_one(ratio, g.advantage[t], 0.95, 1.1))
    return columns_of(rows)


def expect_detached(g: Given) -> Expected:
    rows = []
    for n, o, a in zip(g.now, g.old, g.advantage, strict=True):
        weight = min(max(math.exp(n - o), 0.7), 1.28)
        rows.append((-weight * a * n, -weight * a, False))
    return columns_of(rows)


def expect_straight_through(g: Given) -> Expected:
    rows = []
    for n, o, a in zip(g.now, g.old, g.advantage, strict=True):
        ratio = math.exp(n - o)
        if a > 0 and ratio > 1.25:
            rows.append((-1.25 * a, -1.25 * a, False))
        elif a < 0 and ratio < 0.8:
            rows.append((-0.8 * a, 0.0, True))
        else:
            rows.append((-ratio * a, -ratio * a, False))
    return columns_of(rows)


def expect_dropped(g: Given) -> list[int]:
    """Clip-Cov's tokens: of those in the band that PPO leaves, the ones with the smallest draws."""
    held = held_by_ppo(g, 0.8, 1.3)
    candidates = [t for t, c in enumerate(covariances(g)) if 0.05 < c < 2.0 and not held[t]]
    return sorted(candidates, key=lambda t: g.noise[t])[: room(0.3, len(g.now))]


def expect_penalised(g: Given) -> list[int]:
    """KL-Cov's tokens; batches in which float error decides are left to the test of the plan."""
    cov = covariances(g)
    order = sorted(range(len(cov)), key=lambda t: -cov[t])
    size = room(0.4, len(cov))
    assume(size == len(cov) or cov[order[size - 1]] - cov[order[size]] > 1e-9)
    return order[:size]


def expect_covariance_clip(g: Given) -> Expected:
    dropped = expect_dropped(g)
    rows = []
    for t, (n, o, a) in enumerate(zip(g.now, g.old, g.advantage, strict=True)):
        rows.append((0.0, 0.0, True) if t in dropped else clip_one(math.exp(n - o), a, 0.8, 1.3))
    return columns_of(rows)


def expect_covariance_kl(g: Given) -> Expected:
    penalised = expect_penalised(g)
    rows = []
    for t, (n, o, a) in enumerate(zip(g.now, g.old, g.advantage, strict=True)):
        ratio, charge = math.exp(n - o), 0.7 * (t in penalised)
        rows.append((-ratio * a + charge * abs(n - o), -ratio * a + charge * math.copysign(1, n - o), False))
    return columns_of(rows)


def expect_balanced(g: Given) -> Expected:
    low, high = expect_bounds(g)
    pairs = zip(g.now, g.old, g.advantage, strict=True)
    return columns_of([clip_one(math.exp(n - o), a, low, high) for n, o, a in pairs])


def expect_balanced_code(g: Given) -> Expected:
    low, high = expect_bounds(g, (0.8, 0.95), (1.2, 2.0), (0.05, 0.1), 0.5, "negative", "low", by_probability=False)
    pairs = zip(g.now, g.old, g.advantage, strict=True)
    return columns_of([clip_one(math.exp(n - o), a, low, high) for n, o, a in pairs])


def expect_procedure(g: Given) -> Expected:
    """By cases; trajectories with two dual-clipped tokens or more are left out, and the others' loss grows in turn."""
    low, high, dual, safety = 0.8, 1.28, 1.6, 1.4
    ratios = [math.exp(n - o) for n, o in zip(g.now, g.old, strict=True)]
    often: dict[int, int] = {}
    for ratio, a, own in zip(ratios, g.advantage, g.trajectory, strict=True):
        often[own] = often.get(own, 0) + (a < 0 and ratio > dual)
    kept = math.fsum(c for c, own in zip(g.coefficient, g.trajectory, strict=True) if often[own] < 2)
    rows = []
    for ratio, a, own, future in zip(ratios, g.advantage, g.trajectory, expect_future(g, 2.0, 0.6), strict=True):
        if often[own] > 1:
            rows.append((0.0, 0.0, True))
            continue
        loss, slope, clipped = clip_one(ratio, a, low, high)
        if a < 0 and ratio > dual:
            loss, slope, clipped = -dual * a, 0.0, True
        f = min(max(math.exp(future), 1.0), 1.2)  # upward only, as in the source's scripts; then its cap
        f = min(max(f, 0.8), 1.0) if a < 0 and ratio > safety else f
        scale = (1 + 0.7 * f) * math.fsum(g.coefficient) / kept
        rows.append((loss * scale, slope * scale, clipped))
    return columns_of(rows)


def expect_dual(g: Given, single: Callable[[Given], Expected]) -> Expected:
    """Where A < 0 a ratio above 1.4 counts as 1.4, and has no gradient."""
    rows = []
    for n, o, a, row in zip(g.now, g.old, g.advantage, zip(*single(g), strict=True), strict=True):
        rows.append((-1.4 * a, 0.0, True) if a < 0 and math.exp(n - o) > 1.4 else row)
    return columns_of(rows)


EXPECTED: dict[str, Callable[[Given], Expected]] = {
    "ppo_clip": expect_ppo,
    "ppo_clip_dual": lambda g: expect_dual(g, expect_ppo),
    "straight_through_clip_dual": lambda g: expect_dual(g, expect_straight_through),
    "sequence_clip": expect_sequence,
    "detached_clip": expect_detached,
    "straight_through_clip": expect_straight_through,
    "covariance_clip": expect_covariance_clip,
    "covariance_kl": expect_covariance_kl,
    "balanced_clip": expect_balanced,
    "balanced_clip_code": lambda g: expect_dual(g, expect_balanced_code),
    "procedure_clip": expect_procedure,
}


def expect_kl(now: float, ref: float, estimator: str) -> tuple[float, float]:
    """Estimate and its derivative by log pi."""
    d = now - ref
    if estimator == "k2":
        return d * d / 2, d
    assert estimator == "k3"
    return math.exp(-d) - 1 + d, 1 - math.exp(-d)


# ------------------------------------------------------------------------------------------------ the whole loss


def test_the_rows_cover_the_tables() -> None:
    assert {row_of(name).surrogate.kind for name in SURROGATE_ROWS} == set(SURROGATES) - {"custom"}
    assert {row_of("ppo_clip", name).regulariser.kind for name in REGULARISER_ROWS} <= set(REGULARISERS)
    assert set(EXPECTED) == set(SURROGATE_ROWS) - {"soft_q"}


@pytest.mark.parametrize("surrogate", EXPECTED)
@given(batches())
@properties
def test_surrogates_equal_reference_with_gradient(surrogate: str, batch: TokenBatch) -> None:
    assume(bool(batch.trainable.any()))
    row = row_of(surrogate)
    tokens = in_update(row, batch)
    loss, slope, clipped = loss_and_slope(row, tokens)
    expected = EXPECTED[surrogate](Given.of(tokens))
    assert loss == pytest.approx(expected[0], abs=1e-6)
    assert slope == pytest.approx(expected[1], abs=1e-6)
    assert clipped == expected[2]


@pytest.mark.parametrize("regulariser", REGULARISER_ROWS)
@pytest.mark.parametrize("surrogate", SURROGATE_ROWS)
@given(batches())
@properties
def test_policy_loss_equals_reference_with_gradients(surrogate: str, regulariser: str, batch: TokenBatch) -> None:
    """``count`` is of a larger minibatch, of which these tokens are a piece."""
    assume(bool(batch.trainable.any()))
    row = row_of(surrogate, regulariser)
    tokens = in_update(row, batch)
    m, count = len(tokens.logprob), len(tokens.logprob) + 3
    parts = policy_loss(row, tokens, planned(row, tokens), count)
    if tokens.soft is not None:
        loss, slope, clipped = tokens.soft.tolist(), [0.0] * m, [False] * m
    else:
        loss, slope, clipped = EXPECTED[surrogate](Given.of(tokens))
    now, old, ref = tokens.logprob.tolist(), tokens.logprob_old.tolist(), tokens.ref_logprob.tolist()
    factor, entropy = tokens.coefficient.tolist(), tokens.entropy.tolist()
    kl = moved = shaped = 0.0
    slopes, entropy_slopes = [], []
    for t in range(m):
        extra, extra_slope = expect_kl(now[t], ref[t], row.regulariser.kl_estimator)
        kl += extra / count
        moved += expect_kl(old[t], now[t], "k3")[0] / count
        slopes.append(factor[t] * slope[t] + row.regulariser.kl * extra_slope / count)
        bonus, penalty, low, high = tokens.entropy_terms[t].tolist()
        shaped -= bonus * entropy[t] / count
        leaning = -bonus
        if entropy[t] < low:
            shaped += penalty * (low - entropy[t]) / count
            leaning -= penalty
        elif entropy[t] > high:
            shaped += penalty * (entropy[t] - high) / count
            leaning += penalty
        entropy_slopes.append(leaning / count)
    surrogate_sum = math.fsum(c * value for c, value in zip(factor, loss, strict=True))
    assert parts.surrogate.item() == pytest.approx(surrogate_sum, abs=1e-6)
    assert parts.entropy.item() == pytest.approx(math.fsum(entropy) / count, abs=1e-6)
    assert parts.kl.item() == pytest.approx(kl, abs=1e-6)
    assert parts.moved.item() == pytest.approx(moved, abs=1e-6)
    assert parts.clipped.item() == pytest.approx(sum(clipped) / count, abs=1e-6)
    assert parts.total.item() == pytest.approx(surrogate_sum + shaped + row.regulariser.kl * kl, abs=1e-6)
    leaves = [tokens.logprob, tokens.entropy] + ([] if tokens.soft is None else [tokens.soft])
    gradients = torch.autograd.grad(parts.total, leaves)
    assert gradients[0].tolist() == pytest.approx(slopes, abs=1e-6)
    assert gradients[1].tolist() == pytest.approx(entropy_slopes, abs=1e-6)
    if tokens.soft is not None:
        assert gradients[2].tolist() == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("surrogate", SURROGATE_ROWS)
@given(batches(), st.randoms(use_true_random=False))
@properties
def test_pieces_of_a_minibatch_add_up_to_it(surrogate: str, batch: TokenBatch, order: Any) -> None:
    """Pieces hold whole trajectories in any order; coefficients, count and plan are the minibatch's."""
    row = row_of(surrogate, "band")
    tokens = in_update(row, batch)
    owners = sorted(set(tokens.trajectory.tolist()))
    assume(len(owners) > 1)
    order.shuffle(owners)
    cut = order.randint(1, len(owners) - 1)
    plan, count = planned(row, tokens), len(tokens.logprob)
    whole = policy_loss(row, tokens, plan, count)
    pieces = []
    for group in (owners[:cut], owners[cut:]):
        index = torch.cat([torch.nonzero(tokens.trajectory == owner).flatten() for owner in group])
        named = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
        piece = UpdateTokens(**{name: None if c is None else c[index] for name, c in named.items()})
        renumbered = torch.tensor([group.index(owner) for owner in piece.trajectory.tolist()])
        piece = replace(piece, trajectory=renumbered)
        pieces.append(policy_loss(row, piece, None if plan is None else plan[index], count))
    for term in range(len(whole)):
        together = sum(float(piece[term].detach()) for piece in pieces)
        assert together == pytest.approx(float(whole[term].detach()), abs=1e-6)
    leaves = [tokens.logprob, tokens.entropy] + ([] if tokens.soft is None else [tokens.soft])
    expected = torch.autograd.grad(whole.total, leaves)
    actual = torch.autograd.grad(pieces[0].total + pieces[1].total, leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- one by one


@properties
@given(batches())
def test_ppo_as_a_choice_is_the_two_sided_clip(batch: TokenBatch) -> None:
    row = row_of("ppo_clip")
    tokens = in_update(row, batch)
    actual = surrogate_loss(row, tokens, None)
    expected = ppo_clip(tokens.logprob, tokens.logprob_old, tokens.advantage, low=0.2, high=0.28)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.clipped, expected.clipped)


@properties
@given(batches(), st.sampled_from([0.1, 0.5, 1.5]))
def test_sequence_clip_is_gspo(batch: TokenBatch, spread: float) -> None:
    """-mean_i min(s_i A_i, clip(s_i) A_i), s_i differentiated through the whole sequence, where A is constant in each."""
    assume(bool(batch.trainable.any()))
    row = row_of("sequence_clip")
    tokens = in_update(row, batch, spread)
    owners = sorted(set(tokens.trajectory.tolist()))
    by_owner = {owner: 0.5 - owner % 3 for owner in owners}
    same = torch.tensor([by_owner[o] for o in tokens.trajectory.tolist()], dtype=torch.float64)
    lengths = [int((tokens.trajectory == o).sum()) for o in tokens.trajectory.tolist()]
    mean = torch.tensor([1 / (length * len(owners)) for length in lengths], dtype=torch.float64)
    tokens = replace(tokens, advantage=same, coefficient=mean)
    objective = torch.zeros((), dtype=torch.float64)
    for owner in owners:
        own = [t for t, o in enumerate(tokens.trajectory.tolist()) if o == owner]
        total = torch.zeros((), dtype=torch.float64)
        for t in own:
            total = total + tokens.logprob[t] - tokens.logprob_old[t]
        ratio = torch.exp(total / len(own))
        plain = float(ratio.detach())
        held = min(max(plain, 0.95), 1.1)
        if held * by_owner[owner] < plain * by_owner[owner]:
            objective = objective - held * by_owner[owner] + 0.0 * ratio
        else:
            objective = objective - ratio * by_owner[owner]
    objective = objective / len(owners)
    actual = (tokens.coefficient * surrogate_loss(row, tokens, None).loss).sum()
    assert float(actual.detach()) == pytest.approx(float(objective.detach()), abs=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tokens.logprob), torch.autograd.grad(objective, tokens.logprob), **CLOSE
    )


def test_sequence_clip_by_hand() -> None:
    """Ratios 2 and 0.5 cancel within the first trajectory: no token of it is clipped. The second's ratio is 2."""
    row = method(surrogate={"kind": "sequence_clip", "low": 0.2, "high": 0.2})
    loss, slope, clipped = loss_and_slope(row, few([2.0, 0.5, 4.0, 1.0], [1.0, 1.0, 1.0, -1.0], [0, 0, 1, 1]))
    assert loss == pytest.approx([-1, -1, -1.2, 2])
    assert slope == pytest.approx([-1, -1, 0, 2])
    assert clipped == [False, False, True, False]


def test_detached_clip_keeps_every_gradient() -> None:
    """-sg(clip(r)) A log pi: loss and derivative by log pi at r = 1.5 and 0.5; PPO's derivative there is 0."""
    row = method(surrogate={"kind": "detached_clip", "low": 0.4, "high": 0.2})
    loss, slope, clipped = loss_and_slope(row, few([1.5, 0.5], [1.0, -2.0]))
    assert loss == pytest.approx([-1.2 * math.log(1.5), 2 * 0.6 * math.log(0.5)])
    assert slope == pytest.approx([-1.2, 1.2])
    assert clipped == [False, False]
    ppo = method(surrogate={"kind": "ppo_clip", "low": 0.4, "high": 0.2})
    assert loss_and_slope(ppo, few([1.5, 0.5], [1.0, -2.0]))[1] == [0.0, 0.0]


def test_detached_clip_as_published_has_no_lower_bound() -> None:
    row = method(surrogate={"kind": "detached_clip"})
    assert loss_and_slope(row, few([0.01, 0.01], [1.0, -1.0]))[1] == pytest.approx([-0.01, 0.01])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient"),
    [
        (1.5, 1.0, 1.2, 1.2),  # the fact: value clipped, gradient kept, and scaled to the bound
        (1.5, -1.0, -1.5, -1.5),
        (0.5, -1.0, -0.8, 0.0),
        (0.5, 1.0, 0.5, 0.5),
        (1.1, 2.0, 2.2, 2.2),
    ],
)
def test_straight_through_clip_by_hand(ratio: float, advantage: float, objective: float, gradient: float) -> None:
    row = method(surrogate={"kind": "straight_through_clip", "low": 0.2, "high": 0.2})
    loss, slope, clipped = loss_and_slope(row, few([ratio], [advantage]))
    assert -loss[0] == pytest.approx(objective)
    assert -slope[0] == pytest.approx(gradient)
    assert clipped == [gradient == 0.0]
    ppo = method(surrogate={"kind": "ppo_clip", "low": 0.2, "high": 0.2})
    ppo_loss, ppo_slope, _ = loss_and_slope(ppo, few([ratio], [advantage]))
    assert -ppo_loss[0] == pytest.approx(objective)
    assert (ppo_slope[0] == 0.0) == (gradient == 0.0 or (ratio, advantage) == (1.5, 1.0))
