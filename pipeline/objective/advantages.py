"""Slot S3: the advantage A_t of each token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_advantage(
    returns: Float[Tensor, " e"], group: Int[Tensor, " e"], *, std: bool, ddof: int, eps: float
) -> Float[Tensor, " e"]:
    """GRPO: ``A = (R - mean_g) / (std_g + eps)`` (arXiv 2402.03300); ``std=False`` only centres.

    A group of equal returns, a single trajectory among them, has advantage exactly 0: their float mean may differ from
    them by a rounding error, which dividing by a standard deviation of the same size would turn into an advantage.

    Args:
        returns: one per trajectory.
        group: index of its group.
        std: divide by the group's standard deviation.
        ddof: its delta degrees of freedom, 0 or 1.
        eps: added to it.
    """
    groups = int(group.max()) + 1
    count = torch.zeros(groups, dtype=returns.dtype).index_add_(0, group, torch.ones_like(returns))
    mean = torch.zeros(groups, dtype=returns.dtype).index_add_(0, group, returns) / count.clamp_min(1)
    lowest = torch.full((groups,), torch.inf, dtype=returns.dtype).scatter_reduce(0, group, returns, "amin")
    highest = torch.full((groups,), -torch.inf, dtype=returns.dtype).scatter_reduce(0, group, returns, "amax")
    centred = torch.where((lowest == highest)[group], 0.0, returns - mean[group])
    if not std:
        return centred
    squares = torch.zeros(groups, dtype=returns.dtype).index_add_(0, group, centred**2)
    deviation = (squares / (count - ddof).clamp_min(1)).sqrt()
    return centred / (deviation[group] + eps)


def to_tokens(
    per_trajectory: Float[Tensor, " e"], trajectory: Int[Tensor, " n"], trainable: Bool[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Broadcast a trajectory's value to its trainable tokens; 0 elsewhere."""
    return torch.where(trainable, per_trajectory[trajectory], 0.0)


def gae(
    reward: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, " n"]:
    """Token-level generalised advantage estimation (arXiv 1506.02438, eq. 16) over trainable tokens only.

    Prompt and observation tokens are skipped, never discounted through: the successor of a turn's last token is the next
    turn's first. ``delta_t = r_t + gamma * V_{t+1} - V_t`` with ``V = 0`` after the last one.

    Args:
        reward: stands on trainable tokens.
        values: V of the state in which each token is chosen.
        trainable: the policy chose this token.
        trajectory: index of its trajectory, non-decreasing.
        gamma: discount per trainable token.
        lam: lambda.

    Returns:
        Advantages, 0 where not trainable.

    Raises:
        ValueError: a reward stands on a token that is not trainable.
    """
    if bool((reward[~trainable] != 0).any()):
        raise ValueError("a reward stands on a token that the policy did not choose")
    index = torch.nonzero(trainable).squeeze(-1)
    own, r, v = trajectory[index].tolist(), reward[index].tolist(), values[index].tolist()
    result = [0.0] * len(r)
    following_advantage = following_value = 0.0
    following_trajectory = -1
    for t in range(len(r) - 1, -1, -1):
        if own[t] != following_trajectory:
            following_advantage = following_value = 0.0
        following_advantage = r[t] + gamma * following_value - v[t] + gamma * lam * following_advantage
        result[t], following_value, following_trajectory = following_advantage, v[t], own[t]
    advantages = torch.zeros_like(values)
    advantages[index] = torch.tensor(result, dtype=values.dtype)
    return advantages


def whiten(advantages: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], eps: float = 1e-8) -> Float[Tensor, " n"]:
    """Zero mean and unit (population) standard deviation over trainable tokens; 0 elsewhere."""
    chosen = advantages[trainable]
    if len(chosen) == 0:
        return advantages
    centred = (advantages - chosen.mean()) / (chosen.var(unbiased=False) + eps).sqrt()
    return torch.where(trainable, centred, 0.0)
