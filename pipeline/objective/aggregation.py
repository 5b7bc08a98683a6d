"""Slot S4, second half: what divides the weighted sum of token losses."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def coefficients(
    weights: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], trajectory: Int[Tensor, " n"], aggregation: str
) -> Float[Tensor, " n"]:
    """Per-token factors c_t with which a minibatch's loss is ``sum_t c_t * loss_t``.

    * ``weight_sum``: ``w_t / sum w`` (ActFocus, arXiv 2605.14558; with w = 1 the token mean);
    * ``token_mean``: ``w_t / n`` with n trainable tokens;
    * ``sequence_mean``: each trajectory's weighted mean, then the mean over trajectories (GRPO, arXiv 2402.03300).

    Args:
        weights: token weights of one minibatch, 0 where not trainable.
        trainable: the policy chose this token.
        trajectory: index of its trajectory.
        aggregation: one of the three.

    Returns:
        Factors, 0 where not trainable; all 0 if nothing has weight.
    """
    if aggregation == "weight_sum":
        return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    if aggregation == "token_mean":
        return weights / trainable.sum().clamp_min(1)
    totals = torch.zeros(int(trajectory.max()) + 1, dtype=weights.dtype).index_add_(0, trajectory, weights)
    alive = (totals > 0).sum().clamp_min(1)
    return (
        torch.where(weights > 0, weights / totals[trajectory].clamp_min(torch.finfo(weights.dtype).tiny), 0.0) / alive
    )
