"""Advantages with value functions and Q against slow references, also where episodes were cut off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.critic_advantages import (
    from_bilevel_gae,
    from_gae,
    from_soft_q,
    from_turn_gae,
)
from pipeline.objective.methods import token_advantages
from pipeline.settings.advantage import (
    GAE,
    BilevelGAE,
    SoftQ,
    TurnGAE,
)
from tests.advantage_cases import (
    DISCOUNTS,
    WITH_HEADS,
    close,
    dense,
    estimates,
    reference_whitened,
    row,
    small_batch,
    turns_of,
)
from tests.batches import CLOSE, batches, noise, properties, section


def by_definition(reward: list[float], value: list[float], gamma: list[float], lam: float) -> list[float]:
    """GAE of one episode: ``A_t = sum_k (prod_{t <= i < k} gamma_i lam) delta_k``, V = 0 after its last step."""
    following = [*value, 0.0][1:]
    delta = [r + g * after - v for r, g, after, v in zip(reward, gamma, following, value, strict=True)]
    return [
        math.fsum(math.prod(g * lam for g in gamma[t:k]) * delta[k] for k in range(t, len(delta)))
        for t in range(len(delta))
    ]


def reference_token_gae(
    batch: TokenBatch, reward: list[float], value: list[float], gamma: float, lam: float, discount: str
) -> list[float]:
    result = [0.0] * len(reward)
    for turns in turns_of(batch):
        tokens = [t for turn in turns for t in turn]
        ends = [turn[-1] for turn in turns]
        factors = [gamma if discount == "token" or t in ends else 1.0 for t in tokens]
        own = by_definition([reward[t] for t in tokens], [value[t] for t in tokens], factors, lam)
        for t, advantage in zip(tokens, own, strict=True):
            result[t] = advantage
    return result


def one_token_per_turn(batch: TokenBatch) -> TokenBatch:
    """Only the last trainable token of each turn is left to the policy."""
    ends = [turn[-1] for turns in turns_of(batch) for turn in turns]
    return replace(batch, trainable=torch.tensor([t in ends for t in range(len(batch.role))]))


def one_turn_per_trajectory(batch: TokenBatch) -> TokenBatch:
    """Only the tokens of each trajectory's first turn that has any are left to the policy."""
    kept = [t for turns in turns_of(batch) if turns for t in turns[0]]
    mask = torch.tensor([t in kept for t in range(len(batch.role))])
    return replace(batch, trainable=mask, reward=torch.where(mask, batch.reward, 0.0))


def on_tokens(batch: TokenBatch, values: list[float]) -> torch.Tensor:
    """Values of the trainable tokens, in order; 100 on all others, where nobody may look."""
    column = torch.full((len(batch.role),), 100.0, dtype=torch.float64)
    column[batch.trainable] = torch.tensor(values, dtype=torch.float64)
    return column


# --------------------------------------------------------------------------------------------------- token GAE


@properties
@given(batches(), DISCOUNTS, DISCOUNTS, st.sampled_from(["token", "turn"]), st.booleans())
def test_gae_equals_definition(batch: TokenBatch, gamma: float, lam: float, discount: str, whiten: bool) -> None:
    batch, value = dense(batch), noise(batch)
    raw = reference_token_gae(batch, batch.reward.tolist(), value.tolist(), gamma, lam, discount)
    estimate = from_gae(
        batch, {"value": value}, {}, section(GAE, gamma=gamma, discount=discount, lam=lam, whiten=whiten)
    )
    close(estimate.advantage, reference_whitened(batch, raw) if whiten else raw)
    target = estimate.targets["value"]
    assert torch.equal(target.mask, batch.trainable)
    chosen = batch.trainable.tolist()
    close(target.value, [a + v if t else 0.0 for a, v, t in zip(raw, value.tolist(), chosen, strict=True)])


@properties
@given(batches(), DISCOUNTS)
def test_turn_discount_of_1_is_token_gae(batch: TokenBatch, lam: float) -> None:
    """POAD's fact: what it adds is a discount at action ends only."""
    parts = [
        from_gae(batch, estimates(batch), {}, section(GAE, gamma=1.0, discount=discount, lam=lam, whiten=False))
        for discount in ("turn", "token")
    ]
    assert torch.equal(parts[0].advantage, parts[1].advantage)


@properties
@given(batches(), DISCOUNTS, DISCOUNTS)
def test_turn_discount_with_one_token_per_action_is_gae_over_actions(
    batch: TokenBatch, gamma: float, lam: float
) -> None:
    batch, value = one_token_per_turn(batch), noise(batch).tolist()
    expected = [0.0] * len(batch.role)
    for turns in turns_of(batch):
        actions = [token for (token,) in turns]
        reward = [float(batch.reward[t]) for t in actions]
        own = by_definition(reward, [value[t] for t in actions], [gamma] * len(actions), lam)
        for t, advantage in zip(actions, own, strict=True):
            expected[t] = advantage
    actual = from_gae(
        batch, {"value": noise(batch)}, {}, section(GAE, gamma=gamma, discount="turn", lam=lam, whiten=False)
    )
    close(actual.advantage, expected)


def test_golden_turn_discount() -> None:
    """Two turns of two tokens, reward 8 at the end, gamma 0.5, lambda 1: halved once, between the turns."""
    batch = small_batch([[2, 2]], [[0, 8]], [[0, 1]])
    settings = {"gamma": 0.5, "discount": "turn", "whiten": False}
    estimate = token_advantages(row("gae", **settings), batch, {"value": on_tokens(batch, [0, 0, 0, 0])})
    assert estimate.advantage[batch.trainable].tolist() == [4, 4, 8, 8]


# ----------------------------------------------------------------------------------------------- GAE over turns


@properties
@given(batches(), DISCOUNTS, DISCOUNTS, st.booleans())
def test_turn_gae_equals_definition(batch: TokenBatch, gamma: float, lam: float, whiten: bool) -> None:
    batch, value = dense(batch), noise(batch).tolist()
    raw, target, mask = [0.0] * len(value), [0.0] * len(value), [False] * len(value)
    for turns in turns_of(batch):
        reward = [math.fsum(float(batch.reward[t]) for t in turn) for turn in turns]
        own = by_definition(reward, [value[turn[0]] for turn in turns], [gamma] * len(turns), lam)
        for turn, advantage in zip(turns, own, strict=True):
            for t in turn:
                raw[t] = advantage
            target[turn[0]], mask[turn[0]] = advantage + value[turn[0]], True
    estimate = from_turn_gae(batch, {"value": noise(batch)}, {}, section(TurnGAE, gamma=gamma, lam=lam, whiten=whiten))
    close(estimate.advantage, reference_whitened(batch, raw) if whiten else raw)
    close(estimate.targets["value"].value, target)
    assert estimate.targets["value"].mask.tolist() == mask


def test_golden_turn_gae() -> None:
    """Values 1 and 3 at the turns' first tokens, reward 2 at the end, gamma 0.5, lambda 0.5.

    A_2 = 2 - 3 = -1; A_1 = 0 + 0.5 * 3 - 1 + 0.25 * -1 = 0.25.
    """
    batch = small_batch([[2, 2]], [[0, 2]], [[0, 1]])
    settings = {"gamma": 0.5, "lam": 0.5, "whiten": False}
    estimate = token_advantages(row("turn_gae", **settings), batch, {"value": on_tokens(batch, [1, 50, 3, 50])})
    assert estimate.advantage[batch.trainable].tolist() == [0.25, 0.25, -1, -1]
    assert estimate.targets["value"].value[batch.trainable].tolist() == [1.25, 0, 2, 0]
    assert estimate.targets["value"].mask[batch.trainable].tolist() == [True, False, True, False]


def reference_bilevel(
    batch: TokenBatch, value: list[float], turn_gamma: float, turn_lam: float, gamma: float, lam: float
) -> list[float]:
    """Written forwards: the sum over later turns, then the sum over later tokens of the turn."""
    result = [0.0] * len(value)
    for turns in turns_of(batch):
        ends = [turn[-1] for turn in turns]
        reward = [float(batch.reward[t]) for t in ends]
        high = by_definition(reward, [value[t] for t in ends], [turn_gamma] * len(ends), turn_lam)
        for turn, own in zip(turns, high, strict=True):
            last = len(turn) - 1
            for i, t in enumerate(turn):
                deltas = [
                    float(batch.reward[turn[j]]) + gamma * value[turn[j + 1]] - value[turn[j]] for j in range(last)
                ]
                deltas.append(own)
                result[t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, last + 1))
    return result


@properties
@given(batches(), DISCOUNTS, DISCOUNTS, DISCOUNTS, DISCOUNTS, st.booleans())
def test_bilevel_gae_equals_definition(
    batch: TokenBatch, turn_gamma: float, turn_lam: float, gamma: float, lam: float, whiten: bool
) -> None:
    for rewarded in (batch, dense(batch), replace(batch, reward=torch.zeros_like(batch.reward))):
        value = noise(batch)
        raw = reference_bilevel(rewarded, value.tolist(), turn_gamma, turn_lam, gamma, lam)
        settings = {"turn_gamma": turn_gamma, "turn_lam": turn_lam, "gamma": gamma, "lam": lam, "whiten": whiten}
        estimate = from_bilevel_gae(rewarded, {"value": value}, {}, section(BilevelGAE, **settings))
        close(estimate.advantage, reference_whitened(batch, raw) if whiten else raw)
        target, chosen = estimate.targets["value"], batch.trainable.tolist()
        assert torch.equal(target.mask, batch.trainable)
        close(target.value, [a + v if t else 0.0 for a, v, t in zip(raw, value.tolist(), chosen, strict=True)])


@properties
@given(batches(), DISCOUNTS, DISCOUNTS)
def test_bilevel_gae_of_one_turn_is_token_gae(batch: TokenBatch, gamma: float, lam: float) -> None:
    batch = dense(one_turn_per_trajectory(batch))
    expected = reference_token_gae(batch, batch.reward.tolist(), noise(batch).tolist(), gamma, lam, "token")
    settings = {"turn_gamma": 0.5, "turn_lam": 0.5, "gamma": gamma, "lam": lam, "whiten": False}
    actual = from_bilevel_gae(batch, {"value": noise(batch)}, {}, section(BilevelGAE, **settings))
    close(actual.advantage, expected)


def test_golden_bilevel_gae_without_any_reward() -> None:
    """Turns end where they end, not where a reward is. Values 1, 2 | 3, 4; turn discount 0.5, turn lambda 0.5.

    A_4 = -4 and A_3 = 4 - 3 - 4 = -3; A_2 = 0.5 * 4 - 2 + 0.25 * -4 = -1 and A_1 = 2 - 1 - 1 = 0.
    """
    batch = small_batch([[2, 2]], [[0, 0]], [[0, 1]])
    settings = {"turn_gamma": 0.5, "turn_lam": 0.5, "whiten": False}
    estimate = token_advantages(row("bilevel_gae", **settings), batch, {"value": on_tokens(batch, [1, 2, 3, 4])})
    assert estimate.advantage[batch.trainable].tolist() == [0, -1, -3, -4]


# ------------------------------------------------------------------------------------------------------- soft Q


@properties
@given(batches(), DISCOUNTS)
def test_soft_q_equals_reference(batch: TokenBatch, gamma: float) -> None:
    soft, taken = noise(batch, 1).tolist(), noise(batch, 2).tolist()
    target, advantage = [0.0] * len(soft), [0.0] * len(soft)
    for turns in turns_of(batch):
        for k, turn in enumerate(turns):
            for j, t in enumerate(turn):
                advantage[t] = taken[t] - soft[t]
                if j + 1 < len(turn):
                    target[t] = soft[turn[j + 1]]
                elif k + 1 < len(turns):
                    target[t] = float(batch.reward[t]) + gamma * soft[turns[k + 1][0]]
                else:
                    target[t] = float(batch.reward[t])
    heads = {"soft_value": noise(batch, 1), "taken": noise(batch, 2)}
    estimate = from_soft_q(batch, heads, {}, section(SoftQ, gamma=gamma))
    close(estimate.advantage, advantage)
    close(estimate.targets["q"].value, target)
    assert torch.equal(estimate.targets["q"].mask, batch.trainable)


def test_golden_soft_q() -> None:
    """S = 1, 2 | 4, 8 and a reward of 3 at the first turn's end, 5 at the episode's; gamma 0.5."""
    batch = small_batch([[2, 2], [1]], [[3, 5], [7]], [[0, 1], [0]])
    heads = {"soft_value": on_tokens(batch, [1, 2, 4, 8, 16]), "taken": on_tokens(batch, [0, 1, 2, 3, 4])}
    estimate = token_advantages(row("soft_q", gamma=0.5), batch, heads)
    assert estimate.targets["q"].value[batch.trainable].tolist() == [2, 3 + 0.5 * 4, 8, 5, 7]
    assert estimate.advantage[batch.trainable].tolist() == [-1, -1, -2, -5, -12]


# --------------------------------------------------------------------------------------- episodes that were cut off


CRITICS: dict[str, dict[str, Any]] = {
    "gae": {"gamma": 0.9, "lam": 0.7, "whiten": False},
    "turn_gae": {"gamma": 0.9, "lam": 0.7, "whiten": False},
    "bilevel_gae": {"turn_gamma": 0.9, "turn_lam": 0.7, "gamma": 0.8, "lam": 0.6, "whiten": False},
    "entropy_gae": {"gamma": 0.9, "lam": 0.7, "whiten": False, "budget": 1.3},
    "soft_q": {"gamma": 0.9},
}


def behind(batch: TokenBatch) -> dict[str, torch.Tensor]:
    """Of every third trajectory what was cut off; the others truly end."""
    cut = torch.arange(batch.trajectories) % 3 == 0
    numbers = torch.from_numpy(np.random.default_rng(7).standard_normal((3, batch.trajectories)))
    names = ("value_behind", "entropy_value_behind", "soft_value_behind")
    return {name: torch.where(cut, own, 0.0) for name, own in zip(names, numbers, strict=True)}


@properties
@given(batches(), DISCOUNTS, DISCOUNTS, st.sampled_from(["token", "turn"]))
def test_what_is_behind_a_cut_off_episode_is_the_value_of_one_more_step(
    batch: TokenBatch, gamma: float, lam: float, discount: str
) -> None:
    """GAE by its definition with a last state whose value is known, and which has no delta of its own."""
    batch, value, known = dense(batch), noise(batch), behind(batch)["value_behind"]
    expected = [0.0] * len(batch.role)
    for own, turns in enumerate(turns_of(batch)):
        tokens, ends = [t for turn in turns for t in turn], [turn[-1] for turn in turns]
        g = [gamma if discount == "token" or t in ends else 1.0 for t in tokens]
        states = [*(float(value[t]) for t in tokens), float(known[own])]
        delta = [float(batch.reward[t]) + g[i] * states[i + 1] - states[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            expected[t] = math.fsum(math.prod(f * lam for f in g[i:k]) * delta[k] for k in range(i, len(tokens)))
    heads = {"value": value, "value_behind": known}
    estimate = from_gae(batch, heads, {}, section(GAE, gamma=gamma, discount=discount, lam=lam, whiten=False))
    close(estimate.advantage, expected)
    close(estimate.targets["value"].value, (torch.tensor(expected) + torch.where(batch.trainable, value, 0.0)).tolist())


@pytest.mark.parametrize("kind", CRITICS)
@given(batches())
@properties
def test_a_value_behind_an_episode_is_a_reward_at_its_end_and_none_behind_a_true_end(
    kind: str, batch: TokenBatch
) -> None:
    """Discounted once: what follows a last token can be paid out on that token, whatever the estimator."""
    chosen = row(kind, **CRITICS[kind], cut_off="bootstrap")
    heads, known = estimates(batch), behind(batch)
    nothing = {name: torch.zeros_like(value) for name, value in known.items()}
    ends = torch.zeros(batch.trajectories, len(batch.role), dtype=torch.float64)
    for own, turns in enumerate(turns_of(batch)):
        if turns:
            ends[own, turns[-1][-1]] = 1.0
    name = "soft_value_behind" if kind == "soft_q" else "value_behind"
    paid = replace(batch, reward=batch.reward + 0.9 * known[name] @ ends)
    if kind == "entropy_gae":  # whose entropy has a value of its own
        known_entropy = {"entropy_value_behind": known["entropy_value_behind"]}
        nothing |= known_entropy
    actual = token_advantages(chosen, batch, heads | known)
    expected = token_advantages(chosen, paid, heads | nothing)
    torch.testing.assert_close(actual.advantage, expected.advantage, **CLOSE)
    for head, target in actual.targets.items():
        torch.testing.assert_close(target.value, expected.targets[head].value, **CLOSE)
    still = token_advantages(chosen, batch, heads | {name: torch.zeros_like(value) for name, value in known.items()})
    plain = token_advantages(row(kind, **CRITICS[kind]), batch, heads)
    assert torch.equal(still.advantage, plain.advantage)


@pytest.mark.parametrize(("kind", "names"), WITH_HEADS.items())
def test_bootstrapping_without_what_is_behind_is_refused(kind: str, names: str) -> None:
    batch = small_batch([[2]], [[1]], [[0]])
    missing = ", ".join(f"{name}_behind" for name in names.split(", ") if name != "taken")
    with pytest.raises(ValueError, match=f"advantage {kind} needs the estimates of its heads: {missing}"):
        token_advantages(row(kind, cut_off="bootstrap"), batch, estimates(batch))
