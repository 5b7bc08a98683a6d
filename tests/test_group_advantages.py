"""Advantages that compare within groups, and what turns are, against slow references."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.gae import discounted_returns
from pipeline.objective.group_advantages import from_gated_progress, from_group, from_step_group, from_token_group
from pipeline.objective.methods import token_advantages
from pipeline.objective.turns import first_of_turn, last_of_turn, turn_rewards
from pipeline.settings.advantage import (
    GatedProgressAdvantage,
    GroupAdvantage,
    StepGroupAdvantage,
    TokenGroupAdvantage,
)
from tests.advantage_cases import DISCOUNTS, close, dense, row, small_batch, turns_of
from tests.batches import batches, noise, population, properties, section, sigmoid


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


def compared(batch: TokenBatch, apart: bool) -> list[int]:
    """A number for each group, or for each outcome of one."""
    kinds = [(g, s if apart else None) for g, s in zip(batch.group.tolist(), batch.success.tolist(), strict=True)]
    return [kinds.index(kind) for kind in kinds]


@properties
@given(batches(), st.booleans(), st.sampled_from([0, 1]), st.sampled_from([1e-6, 0.1]), st.booleans())
def test_group_equals_reference(batch: TokenBatch, std: bool, ddof: int, eps: float, apart: bool) -> None:
    own = reference_group(batch.returns.tolist(), compared(batch, apart), std, ddof, eps)
    expected = [own[e] if t else 0.0 for e, t in zip(batch.trajectory.tolist(), batch.trainable.tolist(), strict=True)]
    estimate = from_group(batch, {}, {}, section(GroupAdvantage, std=std, ddof=ddof, eps=eps, apart=apart))
    close(estimate.advantage, expected)
    assert (estimate.targets, estimate.state) == ({}, {})


@properties
@given(batches(), st.sampled_from([0, 1]), st.sampled_from([1e-6, 0.1]), st.booleans())
def test_token_group_equals_reference(batch: TokenBatch, ddof: int, eps: float, apart: bool) -> None:
    """Rewards in steps of 1, so that a group's may all be equal."""
    shaped = replace(batch, reward=torch.where(batch.trainable, noise(batch).round(), 0.0))
    tokens = [t for t in range(len(batch.role)) if bool(batch.trainable[t])]
    groups = [compared(batch, apart)[int(batch.trajectory[t])] for t in tokens]
    own = reference_group([float(shaped.reward[t]) for t in tokens], groups, True, ddof, eps)
    expected = [0.0] * len(batch.role)
    for t, value in zip(tokens, own, strict=True):
        expected[t] = value
    settings = section(TokenGroupAdvantage, ddof=ddof, eps=eps, apart=apart)
    close(from_token_group(shaped, {}, {}, settings).advantage, expected)


def test_apart_neither_outcome_has_an_advantage_over_the_other() -> None:
    """Rewards 1 and 3 of a success's tokens, -5 and -1 of a failure's: -1 and 1 of both by the population's deviation."""
    batch = small_batch([[2], [2]], [[0], [0]], [[0], [0]])
    reward = torch.zeros_like(batch.reward)
    reward[batch.trainable] = torch.tensor([1.0, 3.0, -5.0, -1.0]).double()
    batch = replace(batch, reward=reward, success=torch.tensor([True, False]))
    for apart, expected in (
        (True, [-1, 1, -1, 1]),
        (False, [1.5 / 8.75**0.5, 3.5 / 8.75**0.5, -4.5 / 8.75**0.5, -0.5 / 8.75**0.5]),
    ):
        estimate = token_advantages(row("token_group", ddof=0, apart=apart), batch, {})
        assert estimate.advantage[batch.trainable].tolist() == pytest.approx(expected, abs=1e-5)


def reference_z(values: list[float], cells: list[Any]) -> list[float]:
    """Each value's z-score among those of its cell."""
    result = []
    for value, own in zip(values, cells, strict=True):
        mean, variance = population([v for v, cell in zip(values, cells, strict=True) if cell == own])
        result.append((value - mean) / math.sqrt(variance + 1e-8))
    return result


@properties
@given(batches(), st.sampled_from([0.0, 5.0]), st.sampled_from([0.0, 0.2]), st.sampled_from([1, 4, 7]), st.booleans())
def test_gated_progress_equals_reference(
    batch: TokenBatch, sharpness: float, progress: float, windows: int, std: bool
) -> None:
    tokens = [[t for turn in turns for t in turn] for turns in turns_of(batch)]
    flat = [(e, place, t) for e, own in enumerate(tokens) for place, t in enumerate(own)]
    group = [int(batch.group[e]) for e, _, _ in flat]
    cells = [
        (g, math.floor(windows * place / len(tokens[e]) + 1e-9)) for g, (e, place, _) in zip(group, flat, strict=True)
    ]
    gate = [sigmoid(sharpness * z) for z in reference_z([float(batch.entropy[t]) for _, _, t in flat], group)]
    moved = reference_z([float(batch.logprob[t]) - float(batch.ref_logprob[t]) for _, _, t in flat], cells)
    own = reference_group(batch.returns.tolist(), batch.group.tolist(), std, 1, 1e-6)
    expected = [0.0] * len(batch.role)
    for (e, _, t), w, s in zip(flat, gate, moved, strict=True):
        sign = (own[e] > 0) - (own[e] < 0)
        expected[t] = w * own[e] + progress * w * sign * s
    settings = {"sharpness": sharpness, "progress": progress, "windows": windows, "std": std, "ddof": 1, "eps": 1e-6}
    close(from_gated_progress(batch, {}, {}, section(GatedProgressAdvantage, **settings)).advantage, expected)


def progressed(shift: list[float], entropy: list[float]) -> TokenBatch:
    """A success and a failure of two tokens each, whose log-probabilities have moved so far from the reference's."""
    batch = small_batch([[2], [2]], [[1], [-1]], [[0], [0]])
    columns = {"logprob": torch.zeros_like(batch.logprob), "entropy": torch.zeros_like(batch.entropy)}
    for name, values in (("logprob", shift), ("entropy", entropy)):
        columns[name][batch.trainable] = torch.tensor(values, dtype=torch.float64)
    return replace(batch, **columns)


def test_golden_gated_progress() -> None:
    """Entropies 0, 2, 0, 2 are z-scores of -1 and 1; shifts 1 | -1 in the first window and 3 | -3 in the second, of +-1 both.

    A = +-1 without the deviation, so with the gates g = sigmoid(-5) and h = sigmoid(5): (1 + 0.2) g, (1 + 0.2) h, and with
    the sign of a failure (-1 + 0.2) g, (-1 + 0.2) h.
    """
    batch = progressed([1, 3, -1, -3], [0, 2, 0, 2])
    estimate = token_advantages(row("gated_progress", std=False, windows=2), batch, {})
    g, h = sigmoid(-5), sigmoid(5)
    assert estimate.advantage[batch.trainable].tolist() == pytest.approx([1.2 * g, 1.2 * h, -0.8 * g, -0.8 * h])


def test_rounding_is_no_progress() -> None:
    """Before any update the policy is the reference policy, to a millionth: the advantages are those of GRPO, halved."""
    batch = progressed([1e-7, -1e-7, -2e-7, 1e-7], [1, 1, 1, 1])
    estimate = token_advantages(row("gated_progress", std=False), batch, {})
    assert estimate.advantage[batch.trainable].tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5], abs=1e-3)


def test_a_group_of_equal_returns_has_no_progress_either() -> None:
    batch = replace(progressed([1, 3, -1, -3], [0, 2, 0, 2]), returns=torch.ones(2, dtype=torch.float64))
    assert not bool(token_advantages(row("gated_progress"), batch, {}).advantage.any())


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
