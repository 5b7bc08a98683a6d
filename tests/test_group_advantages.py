"""Advantages that compare within groups, and what turns are, against slow references."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.gae import discounted_returns
from pipeline.objective.group_advantages import from_group, from_step_group, from_token_group
from pipeline.objective.methods import token_advantages
from pipeline.objective.turns import first_of_turn, last_of_turn, turn_rewards
from pipeline.settings.advantage import (
    GroupAdvantage,
    StepGroupAdvantage,
    TokenGroupAdvantage,
)
from tests.advantage_cases import DISCOUNTS, close, dense, row, small_batch, turns_of
from tests.batches import batches, noise, population, properties, section


def reference_group(values: list[float], group: list[int], std: bool, ddof: int, eps: float) -> list[float]:
    result = []
    for value, own in zip(values, group, strict=True):
        members = [v for v, g in zip(values, group, strict=True) if g == own]
        if len(set(members)) == 1:
            result.append(0.0)
            continue
        mean, variance = population(members)
        deviation = math.sqrt(variance * len(members) / (len(members) - ddof))
        result.append((value - mean) / (deviation + eps) if std else value - mean)
    return result


# ------------------------------------------------------------------------------------------------- what turns are


@properties
@given(batches())
def test_first_and_last_of_turn_equal_reference(batch: TokenBatch) -> None:
    turns = [turn for own in turns_of(batch) for turn in own]
    assert torch.nonzero(first_of_turn(batch)).flatten().tolist() == [turn[0] for turn in turns]
    assert torch.nonzero(last_of_turn(batch)).flatten().tolist() == [turn[-1] for turn in turns]


@properties
@given(batches())
def test_turn_rewards_equal_reference(batch: TokenBatch) -> None:
    for shaped in (batch, dense(batch)):
        reward, turn = shaped.reward.tolist(), shaped.turn.tolist()
        expected = [
            math.fsum(r for r, own in zip(reward, turn, strict=True) if own == k)
            for k in range(len(batch.turn_trajectory))
        ]
        close(turn_rewards(shaped), expected)


@properties
@given(batches(), DISCOUNTS)
def test_discounted_returns_equal_reference(batch: TokenBatch, gamma: float) -> None:
    owner = batch.turn_trajectory.tolist()
    reward = noise(batch, 3)[: len(owner)]
    expected = [
        math.fsum(gamma ** (j - k) * float(reward[j]) for j in range(k, len(owner)) if owner[j] == owner[k])
        for k in range(len(owner))
    ]
    close(discounted_returns(reward, batch.turn_trajectory, gamma), expected)


# ------------------------------------------------------------------------------------------------------ groups


@properties
@given(batches(), st.booleans(), st.sampled_from([0, 1]), st.sampled_from([1e-6, 0.1]))
def test_group_equals_reference(batch: TokenBatch, std: bool, ddof: int, eps: float) -> None:
    own = reference_group(batch.returns.tolist(), batch.group.tolist(), std, ddof, eps)
    expected = [own[e] if t else 0.0 for e, t in zip(batch.trajectory.tolist(), batch.trainable.tolist(), strict=True)]
    estimate = from_group(batch, {}, {}, section(GroupAdvantage, std=std, ddof=ddof, eps=eps))
    close(estimate.advantage, expected)
    assert (estimate.targets, estimate.state) == ({}, {})


@properties
@given(batches(), st.sampled_from([0, 1]), st.sampled_from([1e-6, 0.1]))
def test_token_group_equals_reference(batch: TokenBatch, ddof: int, eps: float) -> None:
    """Rewards in steps of 1, so that a group's may all be equal."""
    shaped = replace(batch, reward=torch.where(batch.trainable, noise(batch).round(), 0.0))
    tokens = [t for t in range(len(batch.role)) if bool(batch.trainable[t])]
    groups = [int(batch.group[batch.trajectory[t]]) for t in tokens]
    own = reference_group([float(shaped.reward[t]) for t in tokens], groups, True, ddof, eps)
    expected = [0.0] * len(batch.role)
    for t, value in zip(tokens, own, strict=True):
        expected[t] = value
    close(from_token_group(shaped, {}, {}, section(TokenGroupAdvantage, ddof=ddof, eps=eps)).advantage, expected)


def reference_step_group(
    batch: TokenBatch, step_weight: float, gamma: float, std: bool, episodes_by: str = "trajectory"
) -> list[float]:
    owner, state, turns = batch.turn_trajectory.tolist(), batch.turn_state.tolist(), range(len(batch.turn_trajectory))
    reward = [
        math.fsum(r for r, own in zip(batch.reward.tolist(), batch.turn.tolist(), strict=True) if own == k)
        for k in turns
    ]
    score = [math.fsum(gamma ** (j - k) * reward[j] for j in turns if j >= k and owner[j] == owner[k]) for k in turns]
    episode = reference_group(batch.returns.tolist(), batch.group.tolist(), std, 1, 1e-6)
    if episodes_by == "turn":  # a row per turn, as verl-agent has them
        returns, group = ([values.tolist()[own] for own in owner] for values in (batch.returns, batch.group))
        rows = reference_group(returns, group, std, 1, 1e-6)
        episode = [next((a for a, own in zip(rows, owner, strict=True) if own == e), 0.0) for e in range(len(episode))]
    step = reference_group(score, state, std, 1, 1e-6)
    result = []
    for t in range(len(batch.role)):
        chosen = bool(batch.trainable[t])
        result.append(episode[int(batch.trajectory[t])] + step_weight * step[int(batch.turn[t])] if chosen else 0.0)
    return result


@properties
@given(batches(), st.sampled_from([0.0, 1.0, 0.7]), DISCOUNTS, st.booleans(), st.sampled_from(["trajectory", "turn"]))
def test_step_group_equals_reference(
    batch: TokenBatch, step_weight: float, gamma: float, std: bool, episodes_by: str
) -> None:
    settings = {"step_weight": step_weight, "gamma": gamma, "std": std, "episodes_by": episodes_by}
    actual = from_step_group(batch, {}, {}, section(StepGroupAdvantage, **settings)).advantage
    close(actual, reference_step_group(batch, **settings))


def test_an_episode_may_count_once_per_turn() -> None:
    """Returns 4 of three turns and 0 of one: of mean 2 by trajectory, and of mean 3 by turn; sample deviation 2 then."""
    batch = small_batch([[1, 1, 1], [1]], [[0, 0, 4], [0]], [[0, 1, 2], [3]])
    for episodes_by, std, expected in (
        ("trajectory", False, [2, 2, 2, -2]),
        ("turn", False, [1, 1, 1, -3]),
        ("turn", True, [0.5, 0.5, 0.5, -1.5]),
    ):
        estimate = token_advantages(
            row("step_group", episodes_by=episodes_by, std=std, step_weight=0.0, gamma=0.95), batch, {}
        )
        assert estimate.advantage[batch.trainable].tolist() == pytest.approx(expected, abs=1e-5)


@properties
@given(batches(), st.booleans())
def test_a_turn_alone_in_its_state_has_the_episodes_advantage_only(batch: TokenBatch, std: bool) -> None:
    alone = replace(batch, turn_state=torch.arange(len(batch.turn_state)))
    actual = from_step_group(alone, {}, {}, section(StepGroupAdvantage, step_weight=1.0, gamma=0.95, std=std)).advantage
    assert torch.equal(actual, from_group(batch, {}, {}, section(GroupAdvantage, std=std, ddof=1, eps=1e-6)).advantage)


def test_golden_step_group() -> None:
    """Returns 1 and 0: episode advantages 0.5 and -0.5.

    Both begin in state 0, scored 0.5 and 0 at gamma 0.5: 0.25 and -0.25. Their second states differ: 0 each.
    """
    batch = small_batch([[1, 2], [2, 1]], [[0, 1], [0, 0]], [[0, 1], [0, 2]])
    estimate = token_advantages(row("step_group", gamma=0.5), batch, {})
    assert estimate.advantage[batch.trainable].tolist() == pytest.approx([0.75, 0.5, 0.5, -0.75, -0.75, -0.5])
    halved = token_advantages(row("step_group", gamma=0.5, step_weight=0.5), batch, {})
    assert halved.advantage[batch.trainable].tolist() == pytest.approx([0.625, 0.5, 0.5, -0.625, -0.625, -0.5])
