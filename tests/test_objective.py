"""Every slot function against a slow, obvious reference, and the facts that hold whatever the numbers are."""

from __future__ import annotations

import math
from dataclasses import replace

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
    policy_loss,
    select_groups,
    token_advantages,
    token_weights,
)
from pipeline.objective.standardise import z_score
from pipeline.settings.filter import RewardVariance
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role
from tests.batches import CLOSE, batches, method, noise, population, properties, section
from tests.objective_cases import actfocus, flat_columns, golden_batch, update_tokens

# ---------------------------------------------------------------------------------------------- advantages


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


# ------------------------------------------------------------------------------------------------- filters


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
