"""Separate values of reward and entropy, and the multiplier that holds cumulative entropy at its budget."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.critic_advantages import from_entropy_gae
from pipeline.objective.methods import token_advantages
from pipeline.settings.advantage import EntropyGAE
from tests.advantage_cases import DISCOUNTS, close, reference_whitened, row, small_batch, turns_of
from tests.batches import batches, noise, properties, section


def sums(batch: TokenBatch, reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """GAE from the definition: of every later token what it is better than was expected, discounted."""
    result = [0.0] * len(reward)
    for turns in turns_of(batch):
        tokens = [t for turn in turns for t in turn]
        following = [*(value[t] for t in tokens), 0.0][1:]
        delta = [reward[t] + gamma * v - value[t] for t, v in zip(tokens, following, strict=True)]
        for i, t in enumerate(tokens):
            result[t] = math.fsum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(tokens)))
    return result


def next_entropies(batch: TokenBatch) -> list[float]:
    """On each trainable token the entropy of the next choice of its trajectory."""
    result = [0.0] * len(batch.role)
    for turns in turns_of(batch):
        tokens = [t for turn in turns for t in turn]
        for here, there in pairwise(tokens):
            result[here] = float(batch.entropy[there])
    return result


@properties
@given(
    st.lists(batches(), min_size=3, max_size=3),
    st.sampled_from([0.5, 0.8, 1.3]),
    st.sampled_from([1.0, 0.9]),
    DISCOUNTS,
    st.booleans(),
)
def test_entropy_gae_equals_definition_over_iterations(
    path: list[TokenBatch], budget: float, gamma: float, lam: float, whiten: bool
) -> None:
    settings = {"gamma": gamma, "lam": lam, "budget": budget, "multiplier": 0.3, "multiplier_rate": 0.5}
    state: dict[str, float] = {}
    first, logarithm = None, math.log(0.3)
    for batch in path:
        heads = {"value": noise(batch, 1), "entropy_value": noise(batch, 2)}
        values = {name: head.tolist() for name, head in heads.items()}
        earned = sums(batch, batch.reward.tolist(), values["value"], gamma, lam)
        spread = sums(batch, next_entropies(batch), values["entropy_value"], gamma, lam)
        chosen = batch.trainable.tolist()
        later = [a + v for a, v, t in zip(spread, values["entropy_value"], chosen, strict=True) if t]
        mean = math.fsum(later) / len(later) if later else 0.0
        first = mean if first is None else first
        if first > 0:
            logarithm = min(20.0, max(-20.0, logarithm + 0.5 * (budget - mean / first)))
        raw = [a + math.exp(logarithm) * b for a, b in zip(earned, spread, strict=True)]
        estimate = from_entropy_gae(batch, heads, state, section(EntropyGAE, whiten=whiten, **settings))
        if logarithm < 10:  # else the absolute tolerance means nothing
            close(estimate.advantage, reference_whitened(batch, raw) if whiten else raw)
        for name, own in (("value", earned), ("entropy_value", spread)):
            target = estimate.targets[name]
            assert torch.equal(target.mask, batch.trainable)
            close(target.value, [a + v if t else 0.0 for a, v, t in zip(own, values[name], chosen, strict=True)])
        state = estimate.state
        assert state == pytest.approx(
            {"first_cumulative": first, "multiplier": math.exp(logarithm)}, rel=1e-6, abs=1e-9
        )


def with_entropies(batch: TokenBatch, entropy: list[float]) -> TokenBatch:
    column = torch.zeros_like(batch.entropy)
    column[batch.trainable] = torch.tensor(entropy, dtype=torch.float64)
    return replace(batch, entropy=column)


def no_values(batch: TokenBatch) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(batch.reward) for name in ("value", "entropy_value")}


def test_golden_entropy_gae() -> None:
    """Entropies 1, 2, 4 and a reward of 8 at the end, gamma 0.5, no values yet: the parts are 2, 4, 8 and 4, 4, 0.

    Q_e of the first token is 2 + 0.5 * 4, of the second 4: what it chooses itself is not in it. At budget 1 the multiplier
    stays at 0.5: 2 + 2, 4 + 2 and 8.
    """
    batch = with_entropies(small_batch([[2, 1]], [[0, 8]], [[0, 1]]), [1, 2, 4])
    chosen = row("entropy_gae", gamma=0.5, budget=1.0, multiplier=0.5, whiten=False)
    estimate = token_advantages(chosen, batch, no_values(batch))
    assert estimate.advantage[batch.trainable].tolist() == pytest.approx([4, 6, 8])
    assert estimate.targets["entropy_value"].value[batch.trainable].tolist() == [4, 4, 0]
    assert estimate.state == pytest.approx({"first_cumulative": 8 / 3, "multiplier": 0.5})


def test_entropys_multiplier_rises_while_cumulative_entropy_is_below_its_budget() -> None:
    """Budget 0.8 of the first iteration's, rate 0.5: log alpha moves by -0.1, then 0.2, -0.1, -4.1 and 0.4."""
    batch = small_batch([[2, 2]], [[0, 1]], [[0, 1]])
    state: dict[str, float] = {}
    multiplier = 0.01
    for scale, move in ((1.0, -0.1), (0.4, 0.2), (1.0, -0.1), (9.0, -4.1), (0.0, 0.4)):
        now = with_entropies(batch, [0.5 * scale] * 4)
        multiplier *= math.exp(move)
        state = token_advantages(row("entropy_gae"), now, no_values(batch), state).state
        assert state == pytest.approx({"first_cumulative": 0.75, "multiplier": multiplier}, rel=1e-6)


def test_a_shorter_episode_has_less_cumulative_entropy_at_the_same_entropy_of_tokens() -> None:
    """1 + 2 later choices of entropy 1 in the first iteration, and one of two tokens in the next: 1/2 of 1."""
    long, short = (small_batch([[n]], [[1]], [[0]]) for n in (3, 2))
    state = token_advantages(row("entropy_gae"), with_entropies(long, [1, 1, 1]), no_values(long)).state
    after = token_advantages(row("entropy_gae"), with_entropies(short, [1, 1]), no_values(short), state).state
    assert after["multiplier"] > state["multiplier"]


@pytest.mark.parametrize(("budget", "farthest"), [(2.0, 20.0), (0.5, -20.0)])
def test_the_multiplier_is_never_zero_or_infinite(budget: float, farthest: float) -> None:
    batch = with_entropies(small_batch([[3]], [[1]], [[0]]), [1, 1, 1])
    chosen = row("entropy_gae", budget=budget, multiplier_rate=1e6)
    assert token_advantages(chosen, batch, no_values(batch)).state["multiplier"] == pytest.approx(math.exp(farthest))


def test_a_policy_without_entropy_leaves_the_multiplier_alone() -> None:
    batch = small_batch([[3]], [[1]], [[0]])
    state = token_advantages(row("entropy_gae"), batch, no_values(batch)).state
    assert state == {"first_cumulative": 0.0, "multiplier": pytest.approx(0.01)}


def test_entropy_is_bootstrapped_too() -> None:
    """One token, discount 0.5: A = 0.5 * 4 - 1 where an entropy of 4 is behind, and -1 at an end; the multiplier stays 1."""
    batch = with_entropies(small_batch([[1], [1]], [[0], [0]], [[0], [0]]), [2, 2])
    heads = no_values(batch) | {"entropy_value": torch.where(batch.trainable, 1.0, 0.0).double()}
    heads |= {"value_behind": torch.zeros(2).double(), "entropy_value_behind": torch.tensor([4.0, 0.0]).double()}
    chosen = row("entropy_gae", gamma=0.5, budget=1.0, multiplier=1.0, whiten=False, cut_off="bootstrap")
    assert token_advantages(chosen, batch, heads).advantage[batch.trainable].tolist() == pytest.approx([1.0, -1.0])
