"""Rewards reshaped, and which groups remain, against loops over lists."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective import methods
from pipeline.objective.batch import TokenBatch, positions
from pipeline.objective.filters import all_groups, reward_variance
from pipeline.objective.methods import select_groups, shape_rewards
from pipeline.settings.filter import AllGroups, RewardVariance
from pipeline.settings.method import Method
from pipeline.trajectories.trajectory import Role
from tests.batches import CLOSE, batches, method, noise, properties, section, unbranched

KINDS = [kind for kind in methods.REWARDS if kind != "custom"]
SHAPES = st.sampled_from(
    [
        {"base": 1.0, "bonus": 0.1, "failure": -1.0},
        {"base": 0.5, "bonus": 2.0, "failure": -0.3},
        {"base": 0.0, "bonus": 1.0, "failure": -1.0},
        {"base": 2.0, "bonus": 0.0, "failure": 0.0},
    ]
)


def row(kind: str, **settings: Any) -> Method:
    """A legal method with this reward."""
    advantage = {"kind": "token_group", "apart": False} if kind == "token_entropy" else {"kind": "group"}
    return method(reward={"kind": kind, **settings}, advantage=advantage)


def partly_sure(batch: TokenBatch, sure: str) -> TokenBatch:
    """The batch with no token, some or all of zero entropy."""
    some = {"none": torch.zeros_like(batch.trainable), "some": noise(batch, 9) > 0, "all": ~torch.zeros(1).bool()}[sure]
    return replace(batch, entropy=torch.where(some, 0.0, batch.entropy))


SURE = st.sampled_from(["none", "some", "all"])


def tokens_of(batch: TokenBatch) -> list[list[int]]:
    """Each trajectory's trainable tokens."""
    owner, trainable = batch.trajectory.tolist(), batch.trainable.tolist()
    return [[t for t in range(len(owner)) if owner[t] == e and trainable[t]] for e in range(len(batch.returns))]


def mean_entropies(batch: TokenBatch) -> list[float]:
    return [math.fsum(float(batch.entropy[t]) for t in own) / len(own) if own else 0.0 for own in tokens_of(batch)]


def rivals(batch: TokenBatch, trajectory: int) -> list[int]:
    """The trajectories of its group with its outcome."""
    kinds = list(zip(batch.group.tolist(), batch.success.tolist(), strict=True))
    return [e for e in range(len(kinds)) if kinds[e] == kinds[trajectory]]


def share_of(own: float, entropies: list[float], success: bool) -> float:
    """By the definition; where a failure's 1 / H is infinite, its limit."""
    n, unsure = len(entropies), [h for h in entropies if h > 0]
    if success:
        return n * own / math.fsum(entropies) if unsure else 1.0
    if len(unsure) < n:
        return n / (n - len(unsure)) if own == 0 else 0.0
    return n * (1 / own) / math.fsum(1 / h for h in entropies)


def shaped_by(share: float, earned: float, success: bool, settings: dict[str, float]) -> float:
    if success:
        return settings["base"] * earned + settings["bonus"] * share
    return settings["base"] * settings["failure"] - settings["bonus"] * share


def check(row: Method, batch: TokenBatch, expected: list[float]) -> TokenBatch:
    """Rewards are as expected, returns their sums, and nothing else has changed."""
    shaped = shape_rewards(row, batch)
    torch.testing.assert_close(shaped.reward, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    owner = batch.trajectory.tolist()
    returns = [
        math.fsum(r for r, own in zip(expected, owner, strict=True) if own == e) for e in range(len(batch.returns))
    ]
    torch.testing.assert_close(shaped.returns, torch.tensor(returns, dtype=torch.float64), **CLOSE)
    for name in vars(batch):
        if name not in ("reward", "returns"):
            assert getattr(shaped, name) is getattr(batch, name)
    return shaped


# ------------------------------------------------------------------------------------------------------- rewards


@given(batches())
@properties
def test_plain_reward_leaves_the_batch_alone(batch: TokenBatch) -> None:
    assert shape_rewards(row("none"), batch) is batch


@properties
@given(batches())
def test_positions_equal_reference(batch: TokenBatch) -> None:
    actual = positions(batch).tolist()
    for own in tokens_of(batch):
        assert [actual[t] for t in own] == list(range(len(own)))


@properties
@given(batches(), SHAPES, SURE)
def test_token_entropy_equals_reference(batch: TokenBatch, settings: dict[str, float], sure: str) -> None:
    batch = partly_sure(batch, sure)
    tokens, expected = tokens_of(batch), [0.0] * len(batch.role)
    for e, own in enumerate(tokens):
        for position, t in enumerate(own):
            alive = [float(batch.entropy[tokens[k][position]]) for k in rivals(batch, e) if len(tokens[k]) > position]
            share = share_of(float(batch.entropy[t]), alive, bool(batch.success[e]))
            expected[t] = shaped_by(share, float(batch.returns[e]), bool(batch.success[e]), settings)
    check(row("token_entropy", **settings), batch, expected)


@properties
@given(batches(), SURE)
def test_token_entropys_mean_share_is_one_at_every_position_of_either_outcome(batch: TokenBatch, sure: str) -> None:
    reward = shape_rewards(row("token_entropy", base=0.0, bonus=1.0), partly_sure(batch, sure)).reward
    tokens = tokens_of(batch)
    for e, own in enumerate(tokens):
        for position in range(len(own)):
            alive = [tokens[k][position] for k in rivals(batch, e) if len(tokens[k]) > position]
            shares = [float(reward[t]) for t in alive]
            assert math.fsum(shares) / len(shares) == pytest.approx(1 if bool(batch.success[e]) else -1)


def small_batch(tokens: list[int], entropy: list[float], success: list[bool], dtype: torch.dtype) -> TokenBatch:
    """One group of trajectories of one turn each, a prompt and so many tokens; the successful are rewarded with 1."""
    owner = [e for e, count in enumerate(tokens) for _ in range(1 + count)]
    inside = [k > 0 for count in tokens for k in range(1 + count)]
    ends = [k == count for count in tokens for k in range(1 + count)]
    column = torch.zeros(len(owner), dtype=dtype)
    column[torch.tensor(inside)] = torch.tensor(entropy, dtype=dtype)
    earned = [float(own) for own in success]
    zeros = torch.zeros(len(owner), dtype=dtype)
    return TokenBatch(
        role=torch.tensor([int(Role.ACTION if own else Role.PROMPT) for own in inside]),
        trainable=torch.tensor(inside),
        trajectory=torch.tensor(owner),
        turn=torch.tensor([e if own else -1 for e, own in zip(owner, inside, strict=True)]),
        turn_trajectory=torch.arange(len(tokens)),
        turn_state=torch.zeros(len(tokens), dtype=torch.long),
        group=torch.zeros(len(tokens), dtype=torch.long),
        success=torch.tensor(success),
        returns=torch.tensor(earned, dtype=dtype),
        reward=torch.tensor([earned[e] if end else 0.0 for e, end in zip(owner, ends, strict=True)], dtype=dtype),
        logprob=zeros,
        entropy=column,
        energy=zeros,
        ref_logprob=zeros,
        ref_entropy=zeros,
        noise=zeros,
        **unbranched(len(tokens)),
    )


OUTCOMES = [True, True, False, False]


def test_golden_token_entropy() -> None:
    """Successes of 2 and 1 tokens, failures of 2 and 1: entropies 1 and 3 | 4 and 1 at position 0, then 2 | 7 alone.

    0.5 * 1 + 0.5 * 2 * 1/4 = 0.75; 0.5 + 0.5 * 2 * 3/4 = 1.25; alone 0.5 + 0.5 = 1. Of the failures 1/4 and 1 are 0.4 and
    1.6 of two: 0.5 * -2 - 0.5 * 0.4 = -1.2 and -1 - 0.5 * 1.6 = -1.8; alone -1 - 0.5 = -1.5.
    """
    batch = small_batch([2, 1, 2, 1], [1, 2, 3, 4, 7, 1], OUTCOMES, torch.float64)
    shaped = shape_rewards(row("token_entropy", base=0.5, bonus=0.5, failure=-2.0), batch)
    assert shaped.reward.tolist() == pytest.approx([0, 0.75, 1, 0, 1.25, 0, -1.2, -1.5, 0, -1.8])
    assert shaped.returns.tolist() == pytest.approx([1.75, 1.25, -2.7, -1.8])


def test_golden_sequence_entropy() -> None:
    """Mean entropies 1.5 and 4.5 of the successes, 4 and 1 of the failures: the same shares, of whole trajectories."""
    batch = small_batch([2, 1, 2, 1], [1, 2, 4.5, 3, 5, 1], OUTCOMES, torch.float64)
    shaped = shape_rewards(row("sequence_entropy", base=0.5, bonus=0.5, failure=-2.0), batch)
    assert shaped.reward.tolist() == pytest.approx([0, 0, 0.75, 0, 1.25, 0, 0, -1.2, 0, -1.8])
    assert shaped.returns.tolist() == pytest.approx([0.75, 1.25, -1.2, -1.8])


@pytest.mark.parametrize("kind", ["token_entropy", "sequence_entropy"])
def test_failures_without_any_entropy_share_what_is_lost(kind: str) -> None:
    """Of three, two were sure: -1 - 0.1 * 3/2 each, and -1 for the one that was not."""
    batch = small_batch([1, 1, 1], [0, 0, 1], [False, False, False], torch.float64)
    assert shape_rewards(row(kind), batch).returns.tolist() == pytest.approx([-1.15, -1.15, -1.0])


@pytest.mark.parametrize("kind", ["token_entropy", "sequence_entropy"])
@pytest.mark.parametrize(("success", "shares"), [(True, [500, 1500]), (False, [-1500, -500])])
def test_shares_of_tiny_entropies_neither_overflow_nor_vanish(kind: str, success: bool, shares: list[float]) -> None:
    batch = small_batch([1, 1], [1e-37, 3e-37], [success, success], torch.float32)
    shaped = shape_rewards(row(kind, base=0.0, bonus=1e3), batch)
    assert shaped.returns.tolist() == pytest.approx(shares, rel=1e-4)


@properties
@given(batches(), SHAPES, SURE)
def test_sequence_entropy_equals_reference(batch: TokenBatch, settings: dict[str, float], sure: str) -> None:
    batch = partly_sure(batch, sure)
    tokens, mean, expected = tokens_of(batch), mean_entropies(batch), batch.reward.tolist()
    for e, own in enumerate(tokens):
        if not own:
            continue
        success, earned = bool(batch.success[e]), float(batch.returns[e])
        share = share_of(mean[e], [mean[k] for k in rivals(batch, e) if tokens[k]], success)
        expected[own[-1]] += shaped_by(share, earned, success, settings) - earned
    check(row("sequence_entropy", **settings), batch, expected)


@properties
@given(batches(), SURE)
def test_sequence_entropys_mean_share_is_one_of_either_outcome(batch: TokenBatch, sure: str) -> None:
    shaped = shape_rewards(row("sequence_entropy", base=0.0, bonus=1.0), partly_sure(batch, sure))
    tokens = tokens_of(batch)
    for e in range(len(tokens)):
        members = [k for k in rivals(batch, e) if tokens[k]]
        if members:
            mean = math.fsum(float(shaped.returns[k]) for k in members) / len(members)
            assert mean == pytest.approx(1 if bool(batch.success[e]) else -1)


@pytest.mark.parametrize(("reward", "advantage"), [("token_entropy", "token_group"), ("sequence_entropy", "group")])
def test_a_return_that_all_failures_have_is_refused_where_they_are_compared_with_one_another(
    reward: str, advantage: str
) -> None:
    slots = {"reward": {"kind": reward, "failure": -2.0}, "advantage": {"kind": advantage, "apart": True}}
    with pytest.raises(ValueError, match=r"reward\.failure has no effect while advantage\.apart is true"):
        method(**slots)
    assert method(**{**slots, "advantage": {"kind": advantage, "apart": False}}).reward.kind == reward


@properties
@given(batches(), st.sampled_from([0.1, 2.0]))
def test_entropy_rate_equals_reference(batch: TokenBatch, coefficient: float) -> None:
    expected, mean = batch.reward.tolist(), mean_entropies(batch)
    for e, own in enumerate(tokens_of(batch)):
        if own:
            expected[own[-1]] -= coefficient * mean[e]
    check(row("entropy_rate", coefficient=coefficient), batch, expected)


@properties
@given(batches(), st.sampled_from([0.001, 2.0]))
def test_reference_kl_equals_reference(batch: TokenBatch, coefficient: float) -> None:
    expected = [
        r - coefficient * (new - ref) if chosen else r
        for r, new, ref, chosen in zip(
            batch.reward.tolist(),
            batch.logprob.tolist(),
            batch.ref_logprob.tolist(),
            batch.trainable.tolist(),
            strict=True,
        )
    ]
    check(row("reference_kl", coefficient=coefficient), batch, expected)


@pytest.mark.parametrize("kind", KINDS)
@given(batches())
@properties
def test_no_reward_falls_on_a_token_that_is_not_trainable(kind: str, batch: TokenBatch) -> None:
    """Whatever the columns hold there."""
    columns = {
        name: noise(batch, seed) for seed, name in enumerate(("logprob", "ref_logprob", "entropy", "ref_entropy"))
    }
    shaped = shape_rewards(row(kind), replace(batch, **{name: column.abs() for name, column in columns.items()}))
    assert shaped.reward[~batch.trainable].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@given(batches())
@properties
def test_what_tokens_that_are_not_trainable_hold_is_not_read(kind: str, batch: TokenBatch) -> None:
    others = ~batch.trainable
    names = ("logprob", "ref_logprob", "entropy", "ref_entropy")
    spoilt = {name: torch.where(others, 7.0, getattr(batch, name)) for name in names}
    actual = shape_rewards(row(kind), replace(batch, **spoilt))
    assert torch.equal(actual.reward, shape_rewards(row(kind), batch).reward)
    assert torch.equal(actual.returns, shape_rewards(row(kind), batch).returns)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_keep_their_precision(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        shaped = shape_rewards(row(kind), small_batch([2, 1], [1, 2, 3], [True, False], dtype))
        assert (shaped.reward.dtype, shaped.returns.dtype) == (dtype, dtype)


# ------------------------------------------------------------------------------------------------------- filters


@properties
@given(batches())
def test_all_groups_keeps_every_trajectory(batch: TokenBatch) -> None:
    assert all_groups(batch, section(AllGroups)).tolist() == [True] * len(batch.returns)
    assert select_groups(method(), batch).tolist() == [True] * len(batch.returns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(batches())
@properties
def test_dapo_keeps_exactly_the_groups_whose_returns_differ(dtype: torch.dtype, batch: TokenBatch) -> None:
    returns, group = batch.returns.to(dtype), batch.group.tolist()
    expected = []
    for own in group:
        members = [r for r, g in zip(returns.tolist(), group, strict=True) if g == own]
        expected.append(any(r != members[0] for r in members))
    row = method(filter={"kind": "reward_variance", "keep": 1.0})
    assert select_groups(row, replace(batch, returns=returns)).tolist() == expected


@properties
@given(batches(), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([-0.1, 1 / 3, 0.0]))
def test_no_share_of_groups_keeps_one_of_equal_returns(batch: TokenBatch, keep: float, value: float) -> None:
    """One group is given returns that are all equal, the first, so that it also comes first among ties."""
    returns = torch.where(batch.group == 0, value, batch.returns)
    assert not reward_variance(replace(batch, returns=returns), section(RewardVariance, keep=keep))[
        batch.group == 0
    ].any()
