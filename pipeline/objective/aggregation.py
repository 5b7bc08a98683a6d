"""Aggregation: what divides the weighted sum of token losses.

Each function gives the factors c_t with which a minibatch's loss is ``sum_t c_t * loss_t``. Arguments: the token weights of
one minibatch, 0 where not trainable; which tokens are trainable; the index of each token's trajectory; the section.
Factors are 0 where the weight is, and all 0 if nothing has weight.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.settings.aggregation import ConstantNormaliser, SequenceMean, TokenMean, WeightSum


def weight_sum(
    weights: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], trajectory: Int[Tensor, " n"], section: WeightSum
) -> Float[Tensor, " n"]:
    """``w_t / sum w`` (ActFocus, arXiv 2605.14558); with w = 1 the token mean."""
    return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def token_mean(
    weights: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], trajectory: Int[Tensor, " n"], section: TokenMean
) -> Float[Tensor, " n"]:
    """``w_t / n`` with n trainable tokens."""
    return weights / trainable.sum().clamp_min(1)


def sequence_mean(
    weights: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], trajectory: Int[Tensor, " n"], section: SequenceMean
) -> Float[Tensor, " n"]:
    """Each trajectory's weighted mean, then the mean over the trajectories that have weight (GRPO, arXiv 2402.03300)."""
    trajectories = int(trajectory.max()) + 1 if len(trajectory) else 0
    totals = torch.zeros(trajectories, dtype=weights.dtype).index_add_(0, trajectory, weights)
    alive = (totals > 0).sum().clamp_min(1)
    tiny = torch.finfo(weights.dtype).tiny
    return torch.where(weights > 0, weights / totals[trajectory].clamp_min(tiny), 0.0) / alive


def constant(
    weights: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    section: ConstantNormaliser,
) -> Float[Tensor, " n"]:
    """``w_t / (e * tokens)``: long responses are not blamed less (Dr. GRPO, arXiv 2503.20783).

    e is the number of trajectories that have a trainable token.
    """
    return weights / (max(1, len(torch.unique(trajectory[trainable]))) * section.tokens)
