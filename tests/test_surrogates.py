"""Surrogates, their plans and the policy's whole loss against slow, obvious references, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    REGULARISERS,
    SURROGATES,
    entropy_terms,
    policy_loss,
    surrogate_loss,
    surrogate_plan,
)
from pipeline.objective.soft import soft_policy_loss, soft_state
from pipeline.objective.surrogates import (
    UpdateTokens,
    covariance,
    future_kl,
    plan_balanced_clip,
    plan_covariance_clip,
    plan_covariance_kl,
    ppo_clip,
)
from pipeline.settings.method import Method
from pipeline.settings.surrogate import BalancedClip, CovarianceClip, CovarianceKL
from tests.batches import CLOSE, batches, method, noise, properties, section

SURROGATE_ROWS: dict[str, dict[str, Any]] = {
    "ppo_clip": {"kind": "ppo_clip", "low": 0.2, "high": 0.28},
    "ppo_clip_dual": {"kind": "ppo_clip", "low": 0.2, "high": 0.28, "dual": 1.4},
    "sequence_clip": {"kind": "sequence_clip", "low": 0.05, "high": 0.1},
    "detached_clip": {"kind": "detached_clip", "low": 0.3, "high": 0.28},
    "straight_through_clip": {"kind": "straight_through_clip", "low": 0.2, "high": 0.25},
    "straight_through_clip_dual": {"kind": "straight_through_clip", "low": 0.2, "high": 0.25, "dual": 1.4},
    "covariance_clip": {"kind": "covariance_clip", "low": 0.2, "high": 0.3, "share": 0.3, "band": (0.05, 2.0)},
    "covariance_kl": {"kind": "covariance_kl", "share": 0.4, "coefficient": 0.7},
    "balanced_clip": {"kind": "balanced_clip", "step": 0.07},
    "procedure_clip": {
        "kind": "procedure_clip",
        "dual": 1.6,
        "strength": 0.7,
        "half_life": 2.0,
        "largest_shift": 0.6,
        "safety": 1.4,
    },
    "soft_q": {"kind": "soft_q"},
}
REGULARISER_ROWS: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed", "entropy": 0.03, "kl": 0.2, "kl_estimator": "k2"},
    "band": {"kind": "entropy_band", "entropy": 0.01, "penalty": 0.4, "kl": 0.1, "kl_estimator": "k3"},
}
EARLIER = {"turn_0_entropy": 6.0, "turn_0_tokens": 8.0, "turn_1_entropy": 1.0, "turn_1_tokens": 1.0}


def row_of(surrogate: str, regulariser: str = "fixed") -> Method:
    advantage = {"kind": "soft_q" if surrogate == "soft_q" else "group"}
    return method(advantage=advantage, surrogate=SURROGATE_ROWS[surrogate], regulariser=REGULARISER_ROWS[regulariser])


def in_update(row: Method, batch: TokenBatch, spread: float = 0.5) -> UpdateTokens:
    """The batch's trainable tokens under a policy that has moved; logprob, entropy and soft are leaves."""
    keep = batch.trainable

    def leaf(values: torch.Tensor) -> torch.Tensor:
        return values[keep].clone().requires_grad_(True)

    return UpdateTokens(
        logprob=leaf(batch.logprob + spread * noise(batch, 1)),
        entropy=leaf(noise(batch, 2).abs()),
        logprob_old=batch.logprob[keep],
        ref_logprob=batch.ref_logprob[keep],
        advantage=noise(batch, 3)[keep],
        coefficient=noise(batch, 4)[keep].abs(),
        entropy_terms=torch.stack(entropy_terms(row, batch, EARLIER)[0], dim=-1)[keep],
        noise=batch.noise[keep],
        trajectory=batch.trajectory[keep],
        soft=leaf(noise(batch, 5)) if row.surrogate.kind == "soft_q" else None,
    )


def planned(row: Method, tokens: UpdateTokens) -> torch.Tensor | None:
    make = surrogate_plan(row)
    with torch.no_grad():
        return None if make is None else make(tokens)


def few(
    ratios: Sequence[float],
    advantages: Sequence[float],
    trajectory: Sequence[int] | None = None,
    draws: Sequence[float] | None = None,
) -> UpdateTokens:
    """Tokens of old log-probability 0, coefficient 1."""
    n = len(ratios)
    zeros = torch.zeros(n, dtype=torch.float64)
    return UpdateTokens(
        logprob=torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True),
        entropy=zeros,
        logprob_old=zeros,
        ref_logprob=zeros,
        advantage=torch.tensor(advantages, dtype=torch.float64),
        coefficient=torch.ones(n, dtype=torch.float64),
        entropy_terms=torch.zeros(n, 4, dtype=torch.float64),
        noise=torch.tensor(draws or [0.5] * n, dtype=torch.float64),
        trajectory=torch.tensor(trajectory or [0] * n, dtype=torch.long),
    )


def loss_and_slope(row: Method, tokens: UpdateTokens) -> tuple[list[float], list[float], list[bool]]:
    """Loss of each token, derivative of their sum by log pi, and which were clipped."""
    loss, clipped = surrogate_loss(row, tokens, planned(row, tokens))
    (slope,) = torch.autograd.grad(loss.sum(), tokens.logprob)
    return loss.tolist(), slope.tolist(), clipped.tolist()


# ---------------------------------------------------------------------------------------------- slow references


@dataclass
class Given:
    """What a reference is told: plain numbers."""

    now: list[float]
    old: list[float]
    advantage: list[float]
    coefficient: list[float]
    noise: list[float]
    trajectory: list[int]

    @classmethod
    def of(cls, tokens: UpdateTokens) -> Given:
        columns = (tokens.logprob, tokens.logprob_old, tokens.advantage, tokens.coefficient, tokens.noise)
        return cls(*(c.tolist() for c in columns), tokens.trajectory.tolist())


Expected = tuple[list[float], list[float], list[bool]]
"""Loss, derivative by log pi, clipped."""


def clip_one(ratio: float, advantage: float, lowest: float, highest: float) -> tuple[float, float, bool]:
    """PPO's surrogate of one token, by cases, with bounds of the ratio."""
    if advantage > 0 and ratio > highest:
        return -highest * advantage, 0.0, True
    if advantage < 0 and ratio < lowest:
        return -lowest * advantage, 0.0, True
    return -ratio * advantage, -ratio * advantage, False


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


def covariances(g: Given) -> list[float]:
    mean_a, mean_n = math.fsum(g.advantage) / len(g.advantage), math.fsum(g.now) / len(g.now)
    return [(a - mean_a) * (n - mean_n) for a, n in zip(g.advantage, g.now, strict=True)]


def room(share: float, tokens: int) -> int:
    whole = 0
    while whole + 1 <= share * tokens + 1e-9:
        whole += 1
    return max(1, whole)


def held_by_ppo(g: Given, low: float, high: float) -> list[bool]:
    ratios = [math.exp(n - o) for n, o in zip(g.now, g.old, strict=True)]
    return [clip_one(r, a, low, high)[2] for r, a in zip(ratios, g.advantage, strict=True)]


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


def steps(ends: tuple[float, float], step: float) -> list[float]:
    """All places a bound may stand at."""
    places = [ends[0]]
    while places[-1] < ends[1] - 1e-9:
        places.append(min(ends[1], ends[0] + len(places) * step))
    return places


def carried(g: Given, low: float, high: float) -> tuple[float, float]:
    """Loss of positive and of negative advantages that still has a gradient."""
    gain = cost = 0.0
    for n, o, a, c in zip(g.now, g.old, g.advantage, g.coefficient, strict=True):
        ratio = math.exp(n - o)
        if a > 0 and ratio <= high:
            gain += c * ratio * a
        if a < 0 and ratio >= low:
            cost -= c * ratio * a
    return gain, cost


def enough(g: Given, low: float, high: float, share: float, share_of: str) -> bool:
    gain, cost = carried(g, low, high)
    whole = gain + cost if share_of == "total" else cost
    return gain >= share * whole


def expect_bounds(
    g: Given,
    low: tuple[float, float] = (0.6, 0.9),
    high: tuple[float, float] = (1.2, 3.0),
    step: float = 0.07,
    share: float = 0.5,
    share_of: str = "total",
    first: str = "high",
) -> tuple[float, float]:
    """The first of all pairs that is enough, in the order in which the bounds move; or the last pair."""
    lows, highs = steps(low, step), steps(high, step)
    if first == "high":
        pairs = [(low[0], h) for h in highs] + [(bottom, high[1]) for bottom in lows]
    else:
        pairs = [(bottom, high[0]) for bottom in lows] + [(low[1], h) for h in highs]
    return next((pair for pair in pairs if enough(g, *pair, share, share_of)), pairs[-1])


def expect_balanced(g: Given) -> Expected:
    low, high = expect_bounds(g)
    pairs = zip(g.now, g.old, g.advantage, strict=True)
    return columns_of([clip_one(math.exp(n - o), a, low, high) for n, o, a in pairs])


def expect_future(g: Given, half_life: float, largest: float) -> list[float]:
    """FutureKL: over the later tokens of the same trajectory, each half as much per half-life."""
    result = []
    for t in range(len(g.now)):
        total = 0.0
        for u in range(t, len(g.now)):
            shift = g.now[u] - g.old[u]
            if g.trajectory[u] == g.trajectory[t] and shift <= largest:
                total += 2 ** (-(u - t) / half_life) * shift
        result.append(total)
    return result


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
@given(
    batches(), st.sampled_from([0.05, 0.31]), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.sampled_from([0.5, 1.5])
)
@properties
def test_plan_of_balanced_clip(
    share_of: str, first: str, batch: TokenBatch, step: float, share: float, spread: float
) -> None:
    assume(bool(batch.trainable.any()))
    tokens = in_update(row_of("ppo_clip"), batch, spread)
    low, high = (0.6, 0.9), (1.2, 3.0)
    settings = {"low": low, "high": high, "step": step, "positive_share": share, "share_of": share_of, "first": first}
    with torch.no_grad():
        plan = plan_balanced_clip(tokens, section(BalancedClip, **settings))
    assert plan.shape == (len(tokens.logprob), 2)
    assert bool((plan == plan[0]).all())
    numbers = Given.of(tokens)
    bounds = plan[0].tolist()
    assert bounds == pytest.approx(expect_bounds(numbers, low, high, step, share, share_of, first), abs=1e-9)
    assert low[0] <= bounds[0] <= low[1]
    assert high[0] <= bounds[1] <= high[1]
    at_ends = bounds == [low[1], high[1]]
    assert at_ends or enough(numbers, bounds[0], bounds[1], share, share_of)
    second_moved = bounds[0] > low[0] if first == "high" else bounds[1] > high[0]
    if second_moved:
        assert bounds[1] == high[1] if first == "high" else bounds[0] == low[1]


def test_balanced_clip_by_hand() -> None:
    """Gains: 1 at once, 2 from bound 2 on. Costs: 1.4 in all, 0.7 less from bound 0.7 (exclusive) on.

    high first: 1 of 2.4 is not half, at 2.0 it is 3 of 4.4. low first: at 0.75 it is 1 of 1.7.
    """
    tokens = few([1.0, 2.0, 0.7, 0.7], [1.0, 1.0, -1.0, -1.0])
    options: dict[str, Any] = {"kind": "balanced_clip", "low": (0.6, 0.9), "high": (1.2, 3.0), "step": 0.15}
    for first, bounds in (("high", [0.6, 2.1]), ("low", [0.75, 1.2])):
        row = method(surrogate=options | {"first": first})
        plan = planned(row, tokens)
        assert plan is not None
        assert plan[0].tolist() == pytest.approx(bounds)
    # Half of 1.4 is reached at once.
    plan = planned(method(surrogate=options | {"share_of": "negative"}), tokens)
    assert plan is not None
    assert plan[0].tolist() == pytest.approx([0.6, 1.2])
    loss, slope, clipped = loss_and_slope(method(surrogate=options | {"first": "low"}), tokens)
    assert loss == pytest.approx([-1, -1.2, 0.75, 0.75])
    assert slope == pytest.approx([-1, 0, 0, 0])
    assert clipped == [False, True, True, True]


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


# ---------------------------------------------------------------------------------------------------------- soft_q


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
