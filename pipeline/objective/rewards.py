"""Rewards reshaped before advantages are taken. Each function gives the new reward of every token."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import TokenBatch, positions
from pipeline.objective.turns import last_of_trajectory
from pipeline.settings.reward import (
    EntropyRateReward,
    OutcomeEntropyReward,
    PlainReward,
    ReferenceKLReward,
    SequenceEntropyReward,
    TokenEntropyReward,
)


def plain(batch: TokenBatch, section: PlainReward) -> Float[Tensor, " n"]:
    """The environment's reward."""
    return batch.reward


def token_entropy(batch: TokenBatch, section: TokenEntropyReward) -> Float[Tensor, " n"]:
    """GTPO (arXiv 2508.04349): every token has a reward of its own.

    Of a successful trajectory i, at position t among its trainable tokens: ``base * R_i + bonus * d_t * H_it / sum_k H_kt``,
    the sum over the group's d_t successful trajectories that have a position t. Of any other, j: ``base * failure - bonus
    * h_t * (1 / H_jt) / sum_k (1 / H_kt)``, over the h_t others that have one: there the sure tokens lose most.
    """
    chosen, owner = batch.trainable, batch.trajectory
    place = batch.group[owner] * (int(chosen.sum()) + 1) + positions(batch)
    success = batch.success[owner]
    share = _shares(batch.entropy, place, success, chosen)
    return torch.where(chosen, _shaped(section, success, batch.returns[owner], share), 0.0)


def sequence_entropy(batch: TokenBatch, section: SequenceEntropyReward) -> Float[Tensor, " n"]:
    """GRPO-S (arXiv 2508.04349): the same of whole trajectories, by their mean token entropies.

    ``base * R_i + bonus * n * H_i / sum_k H_k`` over the group's n successful trajectories, ``base * failure - bonus * m
    * (1 / H_j) / sum_k (1 / H_k)`` over its m others; one without a trainable token counts among neither. What changes
    stands on the trajectory's last trainable token.
    """
    counted = batch.per_trajectory(torch.ones_like(batch.entropy)) > 0
    share = _shares(mean_entropy(batch), batch.group, batch.success, counted)
    return batch.reward + at_the_end(batch, _shaped(section, batch.success, batch.returns, share) - batch.returns)


def _shaped(
    section: OutcomeEntropyReward, success: Bool[Tensor, " m"], returns: Float[Tensor, " m"], share: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """What a token or a trajectory has in the end: its share more if it succeeded, its share less if not."""
    lost = section.base * section.failure - section.bonus * share
    return torch.where(success, section.base * returns + section.bonus * share, lost)


def _shares(
    entropy: Float[Tensor, " m"], place: Int[Tensor, " m"], success: Bool[Tensor, " m"], counted: Bool[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """``n * H / sum H`` among the n successes that are counted at a place, ``n * (1 / H) / sum (1 / H)`` among its failures.

    Where 1 / H is infinite those without entropy share alike, which is the limit; so do successes of which none has any.
    """
    entropy = entropy.clamp_min(0)  # rounding may leave it below
    cell = torch.unique(2 * place + success.long(), return_inverse=True)[1]
    cells = int(cell.max()) + 1 if len(cell) else 0
    lowest = torch.full((cells,), torch.inf, dtype=entropy.dtype)
    lowest = lowest.scatter_reduce(0, cell[counted], entropy[counted], "amin")
    inverse = torch.where(entropy > 0, lowest[cell] / entropy, 1.0)  # up to a factor of the cell: nothing overflows
    size = torch.where(counted, torch.where(success, entropy, inverse), 0.0)
    nothing = torch.zeros(cells, dtype=entropy.dtype)
    count = nothing.index_add(0, cell, counted.to(entropy.dtype))
    total = nothing.index_add(0, cell, size)
    # The ratio before the product: entropies of 1e-38 must not overflow.
    return torch.where(total[cell] > 0, size / total[cell] * count[cell], 1.0)


def entropy_rate(batch: TokenBatch, section: EntropyRateReward) -> Float[Tensor, " n"]:
    """After PARL (arXiv 2311.18703): ``R_i - coefficient * H_i`` with H_i the trajectory's mean token entropy; on its last
    trainable token.

    The entropy rate of the states that follow from one another: where a token decides on the next state, its entropy is
    that of the transition, and no model of the dynamics need be learnt. What the environment draws is not in it.
    """
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
