"""What tests of the slots share: random batches, and the arithmetic of their references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.settings.method import Method
from pipeline.settings.section import Section
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role

properties = settings(max_examples=60)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Ragged float64 batches.

    Prompts, observations, prefilled tags, responses without a token of the policy's, groups in any order, turns that
    begin in a state which their group has seen before.
    """
    trajectories = draw(st.integers(1, 6))
    names = draw(st.lists(st.integers(0, 3), min_size=trajectories, max_size=trajectories))
    numbers = {name: index for index, name in enumerate(dict.fromkeys(names))}
    role: list[int] = []
    trainable: list[bool] = []
    owner: list[int] = []
    turn_of: list[int] = []
    reward: list[float] = []
    turn_owner: list[int] = []
    turn_state: list[int] = []
    states: dict[tuple[int, int], int] = {}

    def add(trajectory: int, roles: list[Role], chosen: bool, turn: int) -> None:
        role.extend(map(int, roles))
        trainable.extend([chosen] * len(roles))
        owner.extend([trajectory] * len(roles))
        turn_of.extend([turn] * len(roles))
        reward.extend([0.0] * len(roles))

    for trajectory in range(trajectories):
        add(trajectory, [Role.PROMPT] * draw(st.integers(1, 3)), chosen=False, turn=-1)
        for number in range(draw(st.integers(1, 3))):
            if number:
                add(trajectory, [Role.OBSERVATION] * draw(st.integers(1, 2)), chosen=False, turn=-1)
            turn = len(turn_owner)
            turn_owner.append(trajectory)
            state = (names[trajectory], draw(st.integers(0, 2)))
            turn_state.append(states.setdefault(state, len(states)))
            if draw(st.booleans()):
                add(trajectory, [Role.THINK_TAG], chosen=False, turn=turn)
            response = draw(st.lists(st.sampled_from(RESPONSE_ROLES), max_size=5))
            add(trajectory, response, chosen=True, turn=turn)
            if response:
                reward[-1] = draw(st.sampled_from([0.0, 1.0, -0.1]))
    success = draw(st.lists(st.booleans(), min_size=trajectories, max_size=trajectories))
    iteration = draw(st.sampled_from([0, 1, 50, 500]))
    numbers_of = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = len(role)
    chosen = torch.tensor(trainable)

    def values(scale: float, shift: float = 0.0) -> torch.Tensor:
        return torch.where(chosen, torch.from_numpy(shift + scale * numbers_of.standard_normal(n)), 0.0)

    returns = [math.fsum(r for r, own in zip(reward, owner, strict=True) if own == e) for e in range(trajectories)]
    return TokenBatch(
        role=torch.tensor(role),
        trainable=chosen,
        trajectory=torch.tensor(owner),
        turn=torch.tensor(turn_of),
        turn_trajectory=torch.tensor(turn_owner),
        turn_state=torch.tensor(turn_state),
        group=torch.tensor([numbers[name] for name in names]),
        success=torch.tensor(success),
        returns=torch.tensor(returns, dtype=torch.float64),
        reward=torch.tensor(reward, dtype=torch.float64),
        logprob=-values(1.0).abs(),
        entropy=values(1.0).abs(),
        energy=values(3.0, shift=-10.0),
        ref_logprob=-values(1.0).abs(),
        ref_entropy=values(1.0).abs(),
        noise=torch.from_numpy(numbers_of.random(n)),
        iteration=iteration,
        **unbranched(trajectories),
        advantage=values(1.0),
    )


def unbranched(trajectories: int) -> dict[str, torch.Tensor]:
    """Columns of trajectories of which none is a branch, all sampled at the usual temperature."""
    return {
        "parent": torch.full((trajectories,), -1),
        "split": torch.zeros(trajectories, dtype=torch.long),
        "regular": torch.ones(trajectories, dtype=torch.bool),
    }


def noise(batch: TokenBatch, seed: int = 0) -> torch.Tensor:
    """One normal float64 number per token, trainable or not."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(len(batch.role)))


def section(choice: type[Section], **settings: Any) -> Any:
    """A choice's section with these settings, legal or not."""
    return choice.model_construct(**settings)


def method(**slots: Any) -> Method:
    """A whole row: what is not named is the plainest choice."""
    row: dict[str, Any] = {
        "reward": {"kind": "none"},
        "filter": {"kind": "all"},
        "advantage": {"kind": "group"},
        "weight": {"kind": "uniform"},
        "aggregation": {"kind": "weight_sum"},
        "surrogate": {"kind": "ppo_clip", "low": 0.2, "high": 0.28},
        "regulariser": {"kind": "fixed"},
        "learning_rate": 1e-4,
    }
    return Method.model_validate(row | slots)


BRANCHES: dict[str, dict[str, Any]] = {
    "shared_prefix": {"kind": "entropy_rise"},
    "prefix_credit": {"kind": "positions"},
    "siblings": {"kind": "tree_search"},
    "candidates": {"kind": "positions", "signal": "entropy"},
    "reinforced": {"kind": "temperature_shift"},
}
"""A branching for each advantage that needs one."""


def population(values: list[float]) -> tuple[float, float]:
    """Mean and population variance."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
