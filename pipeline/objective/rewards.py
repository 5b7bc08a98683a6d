"""Rewards reshaped before advantages are taken. Each function gives the new reward of every token."""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.objective.batch import TokenBatch, positions
from pipeline.objective.turns import last_of_trajectory
from pipeline.settings.reward import (
    EntropyRateReward,
    PlainReward,
    ReferenceKLReward,
    SequenceEntropyReward,
    TokenEntropyReward,
)


def plain(batch: TokenBatch, section: PlainReward) -> Float[Tensor, " n"]:
    """The environment's reward."""
    return batch.reward


def token_entropy(batch: TokenBatch, section: TokenEntropyReward) -> Float[Tensor, " n"]:
    """GTPO (arXiv 2508.04349): every token of a trajectory is given a reward of its own.

    Of a successful trajectory i, at position t among its trainable tokens: ``base * R_i + bonus * d_t * H_it / sum_k H_kt``,
    the sum over the d_t successful trajectories of the group that have a position t (all shares equal if nobody there has
    entropy). Of any other trajectory: ``R_i``.
    """
    chosen, owner = batch.trainable, batch.trajectory
    correct = chosen & batch.success[owner]
    cell = batch.group[owner] * (int(chosen.sum()) + 1) + positions(batch)
    cell = torch.unique(cell, return_inverse=True)[1]
    cells = int(cell.max()) + 1 if len(cell) else 0
    nothing = torch.zeros(cells, dtype=batch.entropy.dtype)
    alive = nothing.index_add(0, cell, correct.to(nothing.dtype))
    total = nothing.index_add(0, cell, torch.where(correct, batch.entropy, 0.0))
    # The ratio before the product: entropies of 1e-38 must not overflow.
    share = torch.where(total[cell] > 0, batch.entropy / total[cell] * alive[cell], 1.0)
    earned = batch.returns[owner]
    return torch.where(chosen, torch.where(correct, section.base * earned + section.bonus * share, earned), 0.0)


def sequence_entropy(batch: TokenBatch, section: SequenceEntropyReward) -> Float[Tensor, " n"]:
    """GRPO-S (arXiv 2508.04349): ``base * R_i + bonus * n * H_i / sum_k H_k`` for a successful trajectory.

    H_i is its mean token entropy, the sum is over the group's n successful trajectories. Any other keeps ``R_i``. What
    changes stands on the trajectory's last trainable token.
    """
    entropy = mean_entropy(batch)
    nothing = torch.zeros(int(batch.group.max()) + 1, dtype=entropy.dtype)
    count = nothing.index_add(0, batch.group, batch.success.to(entropy.dtype))
    total = nothing.index_add(0, batch.group, torch.where(batch.success, entropy, 0.0))
    share = torch.where(total[batch.group] > 0, entropy / total[batch.group] * count[batch.group], 1.0)
    change = torch.where(batch.success, (section.base - 1) * batch.returns + section.bonus * share, 0.0)
    return batch.reward + at_the_end(batch, change)


def entropy_rate(batch: TokenBatch, section: EntropyRateReward) -> Float[Tensor, " n"]:
    """After PARL: ``R_i - coefficient * H_i`` with H_i the trajectory's mean token entropy; on its last trainable token."""
    return batch.reward - section.coefficient * at_the_end(batch, mean_entropy(batch))


def reference_kl(batch: TokenBatch, section: ReferenceKLReward) -> Float[Tensor, " n"]:
    """``r_t - coefficient * (log pi_old - log ref)`` on every trainable token (arXiv 2203.02155): k1 as a penalty."""
    penalty = section.coefficient * (batch.logprob - batch.ref_logprob)
    return batch.reward - torch.where(batch.trainable, penalty, 0.0)


def mean_entropy(batch: TokenBatch) -> Float[Tensor, " e"]:
    """Mean entropy of each trajectory's trainable tokens; 0 without any."""
    return batch.per_trajectory(batch.entropy) / batch.per_trajectory(torch.ones_like(batch.entropy)).clamp_min(1)


def at_the_end(batch: TokenBatch, values: Float[Tensor, " e"]) -> Float[Tensor, " n"]:
    """Each trajectory's value on its last trainable token; lost where there is none."""
    return torch.where(last_of_trajectory(batch), values[batch.trajectory].to(batch.reward.dtype), 0.0)
