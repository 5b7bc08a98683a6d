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
    role_ramp,
    spurious_mask,
    top_entropy,
)
from pipeline.settings.weight import (
    AttenuatedWeight,
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


def dimmed(batch: TokenBatch, quantile: float) -> torch.Tensor:
    return attenuated(batch, section(AttenuatedWeight, quantile=quantile))


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
    chosen, unlisted = method(weight=row), row["kind"] == "role_ramp"
    for one in (batch, silent, dull):
        weighed = one.trainable & (one.role != Role.OTHER) if unlisted else one.trainable
        actual = token_weights(chosen, one)
        assert actual.shape == one.role.shape
        assert actual.dtype == torch.float64
        assert bool(actual.isfinite().all())
        assert bool((actual >= 0).all())
        assert not bool(actual[~one.trainable].any())
        assert bool(weighed.any()) == bool(actual.any())
        factors = coefficients(chosen, actual, one.trainable, one.trajectory)
        assert float(factors.sum()) == pytest.approx(1.0 if bool(weighed.any()) else 0.0, abs=1e-9)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_batch_without_a_response_has_no_weight(row: dict[str, Any]) -> None:
    assert token_weights(method(weight=row), line([])).tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------- role_ramp


RAMP = {
    "tag": 1.0,
    "action_start": 1.2,
    "action_growth": 0.0,
    "action_end": 1.2,
    "reasoning_start": 0.6,
    "reasoning_growth": 0.002,
    "reasoning_end": 1.0,
    "other": 0.0,
    "bounds": (0.001, 8.0),
}
ARGUMENTS = {"action_start": 0.6, "action_growth": 0.002}


@properties
@given(
    batches(),
    st.sampled_from(
        [
            RAMP,
            RAMP | ARGUMENTS,
            RAMP | {"action_start": 0.0, "other": 0.5},
            RAMP | {"reasoning_start": 0.0, "reasoning_growth": 0.0, "tag": 3.0, "bounds": (1.1, 2.0)},
        ]
    ),
)
def test_role_ramp_equals_reference(batch: TokenBatch, ramp: dict[str, Any]) -> None:
    """Of what weighs anything: bounded, then divided by its mean over the trajectory."""
    by_role = {Role.THINK_TAG: ramp["tag"], Role.ANSWER_TAG: ramp["tag"], Role.OTHER: ramp["other"]}
    for name, role in (("action", Role.ACTION), ("reasoning", Role.REASONING)):
        weight = ramp[f"{name}_start"]
        if ramp[f"{name}_growth"] > 0:
            weight += ramp[f"{name}_growth"] * batch.iteration
            weight = ramp[f"{name}_end"] if weight > ramp[f"{name}_end"] else weight
        by_role[role] = weight
    expected, (low, high) = {}, ramp["bounds"]
    for trajectory in range(batch.trajectories):
        raw = {t: by_role[Role(int(batch.role[t]))] for t in own_tokens(batch, trajectory)}
        raw = {t: sorted((low, weight, high))[1] for t, weight in raw.items() if weight > 0}
        expected |= {t: weight * len(raw) / math.fsum(raw.values()) for t, weight in raw.items()}
    assert_weights(role_ramp(batch, section(RoleRampWeight, **ramp)), expected)


@properties
@given(batches())
def test_role_ramp_has_mean_one_over_what_it_weighs_of_every_trajectory(batch: TokenBatch) -> None:
    weights = role_ramp(batch, section(RoleRampWeight, **RAMP)).tolist()
    for trajectory in range(batch.trajectories):
        own = [t for t in own_tokens(batch, trajectory) if int(batch.role[t]) != Role.OTHER]
        assert math.fsum(weights[t] for t in own) == pytest.approx(len(own), abs=1e-9)


@pytest.mark.parametrize(
    ("iteration", "reasoning", "arguments"),
    [(0, 0.6, 0.6), (1, 0.602, 0.602), (100, 0.8, 0.8), (200, 1.0, 1.0), (250, 1.0, 1.1), (900, 1.0, 1.2)],
)
def test_role_ramp_raises_reasoning_and_arguments_up_to_their_ends(
    iteration: int, reasoning: float, arguments: float
) -> None:
    """An action weighs as a tool's name, or as its arguments; text that has left the format weighs nothing."""
    roles = [Role.THINK_TAG, Role.REASONING, Role.OTHER, Role.ANSWER_TAG, Role.ACTION]
    batch = line(roles, iteration=iteration)
    for ramp, action in ((RAMP, 1.2), (RAMP | ARGUMENTS, arguments)):
        weights = role_ramp(batch, section(RoleRampWeight, **ramp)).tolist()
        assert [w / weights[1] for w in weights[1:]] == pytest.approx([1, reasoning, 0, 1, action])


def test_role_ramp_by_hand() -> None:
    """Tags 1, reasoning 0.6, the action 1.2 of a mean of 0.95 over four tokens; the fifth is in no region."""
    batch = line([Role.THINK_TAG, Role.REASONING, Role.OTHER, Role.ANSWER_TAG, Role.ACTION])
    weights = role_ramp(batch, section(RoleRampWeight, **RAMP)).tolist()
    assert weights == pytest.approx([0, 1 / 0.95, 0.6 / 0.95, 0, 1 / 0.95, 1.2 / 0.95])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"action_end": 2.0}, "action_end has no effect while action_growth is 0"),
        ({"action_growth": 0.1}, "action_growth has no effect unless action_start is below action_end"),
        ({"reasoning_growth": 0.0, "reasoning_end": 0.7}, "reasoning_end has no effect while reasoning_growth is 0"),
        ({"reasoning_end": 0.6}, "reasoning_growth has no effect unless reasoning_start is below reasoning_end"),
        ({"bounds": [2.0, 1.0]}, "bounds must be two numbers, low <= high"),
    ],
)
def test_a_ramp_that_goes_nowhere_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        method(weight={"kind": "role_ramp", **settings})


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


# --------------------------------------------------------------------------------------------------- attenuated


@properties
@given(batches(), st.sampled_from(SHARES))
def test_attenuated_equals_reference(batch: TokenBatch, share: float) -> None:
    own = trainable_tokens(batch)
    entropy = {t: float(batch.entropy[t]) for t in own}
    bound = quantile(list(entropy.values()), share) if own else 0.0
    likely = {t: math.exp(float(batch.logprob[t])) for t in own}
    expected = {t: likely[t] * (1 - likely[t]) if entropy[t] < bound - 1e-12 else 1.0 for t in own}
    assert_weights(dimmed(batch, share), expected)


def test_attenuated_by_hand() -> None:
    """phi is 0.9 * 0.1, 0.25 * 0.75 and 0.5 * 0.5 of three of them."""
    logprob = [math.log(p) for p in (0.9, 0.9, 0.25, 0.5)]
    batch = line([Role.ACTION] * 4, entropy=[4.0, 1.0, 3.0, 2.0], logprob=logprob)
    assert dimmed(batch, 0.5).tolist() == pytest.approx([0, 1, 0.09, 1, 0.25])
    assert dimmed(batch, 0.0).tolist() == [0, 1, 1, 1, 1]
    assert dimmed(batch, 1.0).tolist() == pytest.approx([0, 1, 0.09, 0.1875, 0.25])


def test_attenuated_of_a_sure_token_is_not_lost_in_rounding() -> None:
    """1 - p of a log-probability of -1e-8 is 1e-8, where 1 - exp(-1e-8) in float32 is 0."""
    batch = line([Role.ACTION] * 2, entropy=[0.0, 1.0], logprob=[-1e-8, -1.0])
    batch = replace(batch, entropy=batch.entropy.float(), logprob=batch.logprob.float())
    assert dimmed(batch, 1.0).tolist() == pytest.approx([0, 1e-8, 1], rel=1e-5)
