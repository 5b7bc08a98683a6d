"""Generalised advantage estimation, and the discounted sums that it is with lambda 1 and no values."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gae(
    reward: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    *,
    gamma: float | Float[Tensor, " n"],
    lam: float,
    behind: Float[Tensor, " e"] | None = None,
) -> Float[Tensor, " n"]:
    """Token-level generalised advantage estimation (arXiv 1506.02438, eq. 16) over trainable tokens only.

    Prompt and observation tokens are skipped, never discounted through: the successor of a turn's last token is the next
    turn's first. ``delta_t = r_t + gamma * V_{t+1} - V_t`` with ``V = behind`` after the last one.

    The result is 0 where not trainable.

    Args:
        reward: stands on trainable tokens.
        values: V of the state in which each token is chosen.
        trainable: the policy chose this token.
        trajectory: index of its trajectory, non-decreasing.
        gamma: discount after each trainable token; one for all, or one per token.
        lam: lambda.
        behind: V of the state behind each trajectory's last trainable token, 0 at a true end; None: 0 for all.

    Raises:
        ValueError: a reward stands on a token that is not trainable.
    """
    if bool((reward[~trainable] != 0).any()):
        raise ValueError("a reward stands on a token that the policy did not choose")
    index = torch.nonzero(trainable).squeeze(-1)
    own, r, v = trajectory[index].tolist(), reward[index].tolist(), values[index].tolist()
    g = gamma[index].tolist() if isinstance(gamma, Tensor) else [gamma] * len(r)
    after = None if behind is None else behind.tolist()
    result = [0.0] * len(r)
    following_advantage = following_value = 0.0
    following_trajectory = -1
    for t in range(len(r) - 1, -1, -1):
        if own[t] != following_trajectory:
            following_advantage, following_value = 0.0, 0.0 if after is None else after[own[t]]
        following_advantage = r[t] + g[t] * following_value - v[t] + g[t] * lam * following_advantage
        result[t], following_value, following_trajectory = following_advantage, v[t], own[t]
    advantages = torch.zeros_like(values)
    advantages[index] = torch.tensor(result, dtype=values.dtype, device=values.device)
    return advantages


def discounted_returns(reward: Float[Tensor, " t"], owner: Int[Tensor, " t"], gamma: float) -> Float[Tensor, " t"]:
    """``sum_{j >= k} gamma^(j-k) r_j`` over later entries of the same owner (non-decreasing)."""
    everything = torch.ones_like(owner, dtype=torch.bool)
    return gae(reward, torch.zeros_like(reward), everything, owner, gamma=gamma, lam=1.0)
