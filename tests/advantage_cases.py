"""Batches and definitions written out over lists, for tests of advantages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.settings.method import Method
from pipeline.trajectories.trajectory import Role
from tests.batches import BRANCHES, CLOSE, method, noise, population, unbranched

WITH_HEADS = {
    "gae": "value",
    "turn_gae": "value",
    "bilevel_gae": "value",
    "entropy_gae": "value, entropy_value",
    "soft_q": "soft_value, taken",
}


DISCOUNTS = st.sampled_from([1.0, 0.9, 0.3, 0.0])


def row(kind: str, **settings: Any) -> Method:
    """A legal method with this advantage."""
    slots: dict[str, Any] = {"advantage": {"kind": kind, **settings}}
    if kind == "soft_q":
        slots["surrogate"] = {"kind": "soft_q"}
    if kind == "token_group":
        slots["reward"] = {"kind": "token_entropy"}
    if kind in BRANCHES:
        slots["branching"] = BRANCHES[kind]
    return method(**slots)


def estimates(batch: TokenBatch) -> dict[str, torch.Tensor]:
    """Every head's, also on tokens that are not trainable."""
    return {
        name: noise(batch, 10 + seed) for seed, name in enumerate(("value", "entropy_value", "soft_value", "taken"))
    }


def dense(batch: TokenBatch, seed: int = 20) -> TokenBatch:
    """The batch with a reward on every trainable token, as the reward slot may leave it."""
    return replace(batch, reward=torch.where(batch.trainable, noise(batch, seed), 0.0))


def turns_of(batch: TokenBatch) -> list[list[list[int]]]:
    """For each trajectory the trainable tokens of each of its turns that has any."""
    result = []
    for trajectory in range(len(batch.returns)):
        turns = []
        for turn, owner in enumerate(batch.turn_trajectory.tolist()):
            tokens = [t for t, own in enumerate(batch.turn.tolist()) if own == turn and batch.trainable.tolist()[t]]
            if owner == trajectory and tokens:
                turns.append(tokens)
        result.append(turns)
    return result


def reference_whitened(batch: TokenBatch, raw: list[float]) -> list[float]:
    chosen = [a for a, t in zip(raw, batch.trainable.tolist(), strict=True) if t]
    if not chosen:
        return raw
    mean, variance = population(chosen)
    whole = [(a - mean) / math.sqrt(variance + 1e-8) for a in raw]
    return [a if t else 0.0 for a, t in zip(whole, batch.trainable.tolist(), strict=True)]


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def small_batch(turns: list[list[int]], reward: list[list[float]], states: list[list[int]]) -> TokenBatch:
    """One group of trajectories, each a prompt and turns of so many tokens with these rewards, from these states."""
    role, trainable, owner, turn_of, rewards, turn_owner = [], [], [], [], [], []
    for trajectory, lengths in enumerate(turns):
        for number, length in enumerate(lengths):
            role += [Role.OBSERVATION if number else Role.PROMPT] + [Role.ACTION] * length
            trainable += [False] + [True] * length
            owner += [trajectory] * (1 + length)
            turn_of += [-1] + [len(turn_owner)] * length
            rewards += [0.0] * length + [reward[trajectory][number]]
            turn_owner.append(trajectory)
    zeros = torch.zeros(len(role), dtype=torch.float64)
    return TokenBatch(
        role=torch.tensor([int(r) for r in role]),
        trainable=torch.tensor(trainable),
        trajectory=torch.tensor(owner),
        turn=torch.tensor(turn_of),
        turn_trajectory=torch.tensor(turn_owner),
        turn_state=torch.tensor([state for own in states for state in own]),
        group=torch.zeros(len(turns), dtype=torch.long),
        success=torch.zeros(len(turns), dtype=torch.bool),
        returns=torch.tensor([math.fsum(own) for own in reward], dtype=torch.float64),
        reward=torch.tensor(rewards, dtype=torch.float64),
        logprob=zeros,
        entropy=zeros,
        energy=zeros,
        ref_logprob=zeros,
        ref_entropy=zeros,
        noise=zeros,
        **unbranched(len(turns)),
    )
