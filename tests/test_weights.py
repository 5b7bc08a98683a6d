"""Token weights of the related methods and of ActFocus's controls against slow, obvious references."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import WEIGHTS, coefficients, token_weights
from pipeline.objective.weights import (
    attenuated,
    pivots,
    role_ramp,
    spurious_mask,
    top_entropy,
)
from pipeline.settings.weight import (
    AttenuatedWeight,
    PivotWeight,
    RoleRampWeight,
    SpuriousMaskWeight,
    TopEntropyWeight,
)
from pipeline.trajectories.trajectory import Role
from tests.batches import batches, method, properties, section
from tests.weight_cases import assert_weights, line, trainable_tokens

ROWS: tuple[dict[str, Any], ...] = (
    {"kind": "uniform"},
    {"kind": "actfocus"},
    {"kind": "actfocus", "form": "softmax"},
    {"kind": "actfocus", "focus": "reasoning"},
    {"kind": "actfocus", "signal": "shuffled_energy"},
    {"kind": "role_ramp"},
    {"kind": "top_entropy"},
    {"kind": "spurious_mask", "probability": 0.5},
    {"kind": "attenuated"},
    {"kind": "pivots"},
)


SHARES = (0.0, 0.25, 0.5, 0.8, 1.0)


def quantile(values: list[float], share: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = min(math.floor(at), max(0, len(ordered) - 2))
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def own_tokens(batch: TokenBatch, trajectory: int) -> list[int]:
    """A trajectory's trainable tokens, in order."""
    owner, trainable = batch.trajectory.tolist(), batch.trainable.tolist()
    return [t for t in range(len(owner)) if owner[t] == trajectory and trainable[t]]


def highest(batch: TokenBatch, share: float) -> torch.Tensor:
    return top_entropy(batch, section(TopEntropyWeight, share=share))


def masked(batch: TokenBatch, probability: float, quantile: float) -> torch.Tensor:
    return spurious_mask(batch, section(SpuriousMaskWeight, probability=probability, quantile=quantile))


def dimmed(batch: TokenBatch, quantile: float, weight: float) -> torch.Tensor:
    return attenuated(batch, section(AttenuatedWeight, quantile=quantile, low_entropy_weight=weight))


def raised(batch: TokenBatch, buckets: int, quantile: float, strength: float) -> torch.Tensor:
    return pivots(batch, section(PivotWeight, buckets=buckets, quantile=quantile, strength=strength))


# ------------------------------------------------------------------------------------------------ all of the table


def test_the_rows_cover_the_table() -> None:
    assert {method(weight=row).weight.kind for row in ROWS} == set(WEIGHTS) - {"custom"}


@pytest.mark.parametrize("row", ROWS, ids=str)
@given(batches())
@properties
def test_every_weight_is_finite_and_zero_outside_trainable_tokens(row: dict[str, Any], batch: TokenBatch) -> None:
    """As drawn, without a trainable token, and with trainable tokens none of which is an action or reasoning."""
    nobody = torch.zeros_like(batch.trainable)
    blank = torch.zeros_like(batch.entropy)
    silent = replace(batch, trainable=nobody, logprob=blank, entropy=blank, advantage=blank)
    dull = replace(batch, role=torch.where(batch.trainable, int(Role.OTHER), batch.role))
    chosen = method(weight=row)
    for one in (batch, silent, dull):
        actual = token_weights(chosen, one)
        assert actual.shape == one.role.shape
        assert actual.dtype == torch.float64
        assert bool(actual.isfinite().all())
        assert bool((actual >= 0).all())
        assert not bool(actual[~one.trainable].any())
        assert bool(one.trainable.any()) == bool(actual.any())
        factors = coefficients(chosen, actual, one.trainable, one.trajectory)
        assert float(factors.sum()) == pytest.approx(1.0 if bool(one.trainable.any()) else 0.0, abs=1e-9)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_batch_without_a_response_has_no_weight(row: dict[str, Any]) -> None:
    assert token_weights(method(weight=row), line([])).tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------- role_ramp


RAMP = {"tag": 1.0, "action": 1.2, "reasoning_start": 0.6, "reasoning_growth": 0.002, "reasoning_end": 1.0}


@properties
@given(batches(), st.sampled_from([RAMP, RAMP | {"action": 0.0}, RAMP | {"reasoning_start": 0.0, "tag": 3.0}]))
def test_role_ramp_equals_reference(batch: TokenBatch, ramp: dict[str, float]) -> None:
    reasoning = ramp["reasoning_start"] + ramp["reasoning_growth"] * batch.iteration
    if reasoning > ramp["reasoning_end"]:
        reasoning = ramp["reasoning_end"]
    expected = {}
    for trajectory in range(batch.trajectories):
        own = own_tokens(batch, trajectory)
        raw = {}
        for t in own:
            role = int(batch.role[t])
            raw[t] = ramp["action"] if role == Role.ACTION else reasoning
            if role in (Role.THINK_TAG, Role.ANSWER_TAG):
                raw[t] = ramp["tag"]
        total = math.fsum(raw.values())
        if total > 0:
            expected |= {t: weight * len(own) / total for t, weight in raw.items()}
    assert_weights(role_ramp(batch, section(RoleRampWeight, **ramp)), expected)


@properties
@given(batches())
def test_role_ramp_has_mean_one_in_every_trajectory(batch: TokenBatch) -> None:
    weights = role_ramp(batch, section(RoleRampWeight, **RAMP)).tolist()
    for trajectory in range(batch.trajectories):
        own = own_tokens(batch, trajectory)
        assert math.fsum(weights[t] for t in own) == pytest.approx(len(own), abs=1e-9)


@pytest.mark.parametrize(
    ("iteration", "reasoning"), [(0, 0.6), (1, 0.602), (100, 0.8), (199, 0.998), (200, 1.0), (900, 1.0)]
)
def test_role_ramp_raises_reasoning_and_malformed_text_up_to_its_end(iteration: int, reasoning: float) -> None:
    roles = [Role.THINK_TAG, Role.REASONING, Role.OTHER, Role.ANSWER_TAG, Role.ACTION]
    weights = role_ramp(line(roles, iteration=iteration), section(RoleRampWeight, **RAMP)).tolist()
    assert [w / weights[1] for w in weights[1:]] == pytest.approx([1, reasoning, reasoning, 1, 1.2])


# -------------------------------------------------------------------------------------------------- top_entropy


@properties
@given(batches(), st.sampled_from([0.01, 0.2, 0.5, 0.75, 1.0]), st.booleans())
def test_top_entropy_keeps_the_ceiling_of_its_share(batch: TokenBatch, share: float, tied: bool) -> None:
    """With ties a token is kept unless enough others are higher, or equal and earlier."""
    if tied:
        batch = replace(batch, entropy=batch.entropy.round())
    own, entropy = trainable_tokens(batch), batch.entropy.tolist()
    room = 0
    while room < share * len(own) - 1e-9:
        room += 1
    expected = {}
    for t in own:
        ahead = sum(entropy[u] > entropy[t] or (entropy[u] == entropy[t] and u < t) for u in own)
        expected[t] = float(ahead < room)
    assert sum(expected.values()) == room
    assert_weights(highest(batch, share), expected)


def test_top_entropy_keeps_the_first_of_equals_and_never_an_untrainable_token() -> None:
    batch = line([Role.REASONING] * 5, entropy=[1.0, 2.0, 1.0, 2.0, 1.0])
    batch = replace(batch, entropy=batch.entropy + torch.tensor([9.0] + [0.0] * 5))
    for share, kept in ((0.2, [1]), (0.4, [1, 3]), (0.6, [0, 1, 3]), (0.8, [0, 1, 2, 3]), (0.41, [0, 1, 3])):
        weights = highest(batch, share).tolist()
        assert weights == [0.0] + [float(t in kept) for t in range(5)]


def test_the_share_of_tokens_is_not_rounded_up_by_float_error() -> None:
    """0.28 * 25 is 7.000000000000001 in floats."""
    batch = line([Role.ACTION] * 25, entropy=[float(t) for t in range(25)])
    for share, room in ((0.28, 7), (0.29, 8), (0.56, 14)):
        assert int(highest(batch, share).sum()) == room


# ------------------------------------------------------------------------------------------------ spurious_mask


@properties
@given(batches(), st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from(SHARES))
def test_spurious_mask_equals_reference(batch: TokenBatch, probability: float, share: float) -> None:
    own, owner = trainable_tokens(batch), batch.trajectory.tolist()
    entropy, advantage, success = batch.entropy.tolist(), batch.advantage.tolist(), batch.success.tolist()
    unlikely = [t for t in own if math.exp(float(batch.logprob[t])) < probability]
    of_success = [entropy[t] for t in unlikely if success[owner[t]]]
    expected = dict.fromkeys(own, 1.0)
    if of_success:
        sure = quantile(of_success, share)
        expected |= {t: 0.0 for t in unlikely if advantage[t] > 0 and entropy[t] < sure - 1e-12}
    assert_weights(masked(batch, probability, share), expected)


@properties
@given(batches())
def test_spurious_mask_masks_nothing_that_is_blamed(batch: TokenBatch) -> None:
    """At the widest setting, where with positive advantages all but the highest entropies would go."""
    blamed = replace(batch, advantage=-batch.advantage.abs())
    assert torch.equal(masked(blamed, 1.0, 1.0), batch.trainable.double())


@properties
@given(batches())
def test_spurious_mask_without_an_unlikely_token_of_success_is_uniform(batch: TokenBatch) -> None:
    rewarded = replace(batch, advantage=batch.advantage.abs() + 1)
    failed = replace(rewarded, success=torch.zeros_like(batch.success))
    likely = replace(rewarded, logprob=torch.zeros_like(batch.logprob))
    for one in (failed, likely):
        assert torch.equal(masked(one, 0.9, 1.0), batch.trainable.double())


def test_spurious_mask_by_hand() -> None:
    """Below probability 0.1 are the tokens 0, 1, 2, 3 and 5, whose median entropy is 1.5; below it are 0 and 3."""
    batch = line(
        [Role.REASONING] * 6,
        logprob=[math.log(p) for p in (0.05, 0.05, 0.09, 0.01, 0.11, 0.02)],
        entropy=[1.0, 1.5, 2.0, 0.5, 0.1, 3.0],
        advantage=[1.0, -1.0, 1.0, 0.5, 1.0, 1.0],
    )
    assert masked(batch, 0.1, 0.5).tolist() == [0, 0, 1, 1, 0, 1, 1]
    # At the 75 % quantile, 2, token 1 is below but blamed, token 2 not below.
    assert masked(batch, 0.1, 0.75).tolist() == [0, 0, 1, 1, 0, 1, 1]
    assert masked(batch, 0.1, 1.0).tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert masked(batch, 0.2, 1.0).tolist() == [0, 0, 1, 0, 0, 0, 1]


# ----------------------------------------------------------------------------------------- attenuated and pivots


@properties
@given(batches(), st.sampled_from(SHARES), st.sampled_from([0.0, 0.3, 1.0]))
def test_attenuated_equals_reference(batch: TokenBatch, share: float, low: float) -> None:
    own = trainable_tokens(batch)
    entropy = {t: float(batch.entropy[t]) for t in own}
    bound = quantile(list(entropy.values()), share) if own else 0.0
    expected = {t: low if entropy[t] < bound - 1e-12 else 1.0 for t in own}
    assert_weights(dimmed(batch, share, low), expected)


def test_attenuated_by_hand() -> None:
    batch = line([Role.ACTION] * 4, entropy=[4.0, 1.0, 3.0, 2.0])
    assert dimmed(batch, 0.5, 0.25).tolist() == [0, 1, 0.25, 1, 0.25]
    assert dimmed(batch, 0.0, 0.25).tolist() == [0, 1, 1, 1, 1]
    assert dimmed(batch, 1.0, 0.25).tolist() == [0, 1, 0.25, 0.25, 0.25]


@properties
@given(batches(), st.sampled_from([1, 2, 4, 7]), st.sampled_from(SHARES))
def test_pivots_equal_reference(batch: TokenBatch, buckets: int, share: float) -> None:
    parts: list[list[int]] = [[] for _ in range(buckets)]
    for trajectory in range(batch.trajectories):
        own = own_tokens(batch, trajectory)
        for place, t in enumerate(own):
            parts[math.floor(buckets * place / len(own) + 1e-9)].append(t)
    expected = {}
    for part in parts:
        entropy = [float(batch.entropy[t]) for t in part]
        for t, value in zip(part, entropy, strict=True):
            expected[t] = 1 + 1.5 * (value >= quantile(entropy, share) - 1e-12)
    assert_weights(raised(batch, buckets, share, 1.5), expected)


def test_pivots_are_relative_to_their_part_of_the_trajectory() -> None:
    """Two parts of three: the highest of each, though the second's would be the lowest of the first."""
    batch = line([Role.REASONING] * 6, entropy=[5.0, 7.0, 6.0, 0.1, 0.3, 0.2])
    assert raised(batch, 2, 1.0, 1.0).tolist() == [0, 1, 2, 1, 1, 2, 1]
    assert raised(batch, 1, 1.0, 1.0).tolist() == [0, 1, 2, 1, 1, 1, 1]
    assert raised(batch, 6, 1.0, 0.5).tolist() == [0] + [1.5] * 6
