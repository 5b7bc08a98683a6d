"""The token weight w_t. Each function gives the weight of every token, 0 where not trainable."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import TokenBatch
from pipeline.objective.standardise import z_score
from pipeline.settings.weight import (
    ActFocusWeight,
    AttenuatedWeight,
    RoleRampWeight,
    SpuriousMaskWeight,
    TopEntropyWeight,
)
from pipeline.trajectories.trajectory import Role


def uniform_weights(batch: TokenBatch) -> Float[Tensor, " n"]:
    """1 on trainable tokens, 0 elsewhere."""
    return batch.trainable.to(batch.entropy.dtype)


def signal_values(batch: TokenBatch, signal: str, focus: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The signals of the ablation (arXiv 2605.14558), higher where more weight shall go.

    ``shuffled_energy`` is a control: the energies of the tokens in ``focus``, in a random order.
    """
    return {
        "reference_energy": lambda: batch.energy,
        "reference_entropy": lambda: batch.ref_entropy,
        "behaviour_nll": lambda: -batch.logprob,
        "logprob_shift": lambda: batch.logprob - batch.ref_logprob,
        "shuffled_energy": lambda: shuffled(batch.energy, focus, batch.noise),
    }[signal]()


def actfocus_weights(batch: TokenBatch, section: ActFocusWeight) -> Float[Tensor, " n"]:
    """ActFocus (arXiv 2605.14558): downweight reasoning, redistribute among action tokens by token energy.

    Reasoning tokens weigh ``alpha``; action tokens weigh, with z the signal's z-score over all action tokens of the batch,

    * ``sigmoid``: ``1 + beta * sigmoid(z / tau)`` (the paper's at tau = 1);
    * ``softmax``: ``(1 - beta) + beta * n_act * softmax(z / tau)`` over the n_act action tokens of one trajectory, whose
      total stays n_act.

    With ``focus`` "reasoning" the two roles change places. The batch is the episodes that passed the filter, before they
    are split into minibatches.
    """
    alpha, beta = section.reasoning_downweight, section.redistribution_strength
    raised_role, other_role = Role.ACTION, Role.REASONING
    if section.focus == "reasoning":
        raised_role, other_role = other_role, raised_role
    chosen = batch.of(raised_role)
    z = z_score(signal_values(batch, section.signal, chosen), chosen) / section.redistribution_temperature
    if section.form == "sigmoid":
        raised = 1 + beta * torch.sigmoid(z)
    else:
        raised = (1 - beta) + beta * _share_of_trajectory(z, chosen, batch.trajectory, batch.trajectories)
    fixed = {
        other_role: alpha,
        Role.THINK_TAG: alpha if section.think_tag_weight is None else section.think_tag_weight,
        Role.ANSWER_TAG: section.answer_tag_weight,
        Role.OTHER: alpha if section.malformed_weight is None else section.malformed_weight,
    }
    return torch.where(chosen, raised, _by_role(batch, fixed))


def role_ramp(batch: TokenBatch, section: RoleRampWeight) -> Float[Tensor, " n"]:
    """ResT (arXiv 2509.21826): weights by role, scaled to a mean of 1 over each trajectory's tokens that have one.

    Action tokens weigh ``min(action_start + action_growth * iteration, action_end)``, reasoning tokens likewise. Weights
    above 0 are moved into ``bounds`` first; tokens of weight 0 are no part of the mean (authors' code).
    """

    def grown(start: float, growth: float, end: float) -> float:
        return min(start + growth * batch.iteration, end) if growth else start

    fixed = {
        Role.REASONING: grown(section.reasoning_start, section.reasoning_growth, section.reasoning_end),
        Role.ACTION: grown(section.action_start, section.action_growth, section.action_end),
        Role.THINK_TAG: section.tag,
        Role.ANSWER_TAG: section.tag,
        Role.OTHER: section.other,
    }
    raw = _by_role(batch, fixed)
    weighed = raw > 0
    raw = torch.where(weighed, raw.clamp(*section.bounds), 0.0)
    mean = batch.per_trajectory(raw) / batch.per_trajectory(weighed.to(raw.dtype)).clamp_min(1)
    return torch.where(weighed, raw / mean[batch.trajectory], 0.0)


def top_entropy(batch: TokenBatch, section: TopEntropyWeight) -> Float[Tensor, " n"]:
    """80/20 (arXiv 2506.01939): 1 on the ``ceil(share * n)`` trainable tokens of highest entropy, 0 on the others.

    Ties go to the token that comes first.
    """
    index = torch.nonzero(batch.trainable).squeeze(-1)
    order = torch.sort(batch.entropy[index], descending=True, stable=True).indices
    weights = torch.zeros_like(batch.entropy)
    room = max(1, math.ceil(round(section.share * len(index), 9)))  # 0.28 * 25 is 7.000000000000001
    weights[index[order[:room]]] = 1.0
    return weights


def spurious_mask(batch: TokenBatch, section: SpuriousMaskWeight) -> Float[Tensor, " n"]:
    """STAPO (arXiv 2602.15620): 0 where a token is rewarded, unlikely, and the policy is sure; 1 elsewhere.

    Rewarded: ``A > 0``. Unlikely: ``pi < probability``. Sure: entropy below the quantile over the unlikely tokens of
    successful trajectories; without any such token nothing is masked. ``pi`` and its entropy are those that the
    iteration's updates begin with: the current policy in the first of them.
    """
    unlikely = batch.trainable & (batch.logprob.exp() < section.probability)
    correct = batch.entropy[unlikely & batch.success[batch.trajectory]]
    if len(correct) == 0:
        return uniform_weights(batch)
    sure = batch.entropy < torch.quantile(correct, section.quantile)
    return torch.where((batch.advantage > 0) & unlikely & sure, 0.0, uniform_weights(batch))


def attenuated(batch: TokenBatch, section: AttenuatedWeight) -> Float[Tensor, " n"]:
    """After EGSPO (arXiv 2602.03309): 1 where the entropy reaches the quantile over the batch, ``p * (1 - p)`` below.

    That is phi of CHORD (arXiv 2508.11408), p the probability of the token.
    """
    chosen = batch.entropy[batch.trainable]
    if len(chosen) == 0:
        return uniform_weights(batch)
    low = batch.trainable & (batch.entropy < torch.quantile(chosen, section.quantile))
    phi = batch.logprob.exp() * -torch.expm1(batch.logprob)
    return torch.where(low, phi, uniform_weights(batch))


def _by_role(batch: TokenBatch, fixed: dict[Role, float]) -> Float[Tensor, " n"]:
    weights = torch.zeros_like(batch.entropy)
    for role, weight in fixed.items():
        weights = torch.where(batch.of(role), weight, weights)
    return weights


def shuffled(values: Float[Tensor, " n"], mask: Bool[Tensor, " n"], noise: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The masked values in the order of their noise."""
    index = torch.nonzero(mask).squeeze(-1)
    result = values.clone()
    result[index] = values[index[torch.argsort(noise[index], stable=True)]]
    return result


def _share_of_trajectory(
    z: Float[Tensor, " n"], mask: Bool[Tensor, " n"], trajectory: Int[Tensor, " n"], trajectories: int
) -> Float[Tensor, " n"]:
    """``n_act * softmax(z)`` within each trajectory's masked tokens."""
    peak = torch.full((trajectories,), -torch.inf, dtype=z.dtype)
    peak = peak.scatter_reduce(0, trajectory, torch.where(mask, z, -torch.inf), "amax")
    grown = torch.where(mask, (z - peak[trajectory]).exp(), 0.0)
    total = torch.zeros(trajectories, dtype=z.dtype).index_add_(0, trajectory, grown)
    count = torch.zeros(trajectories, dtype=z.dtype).index_add_(0, trajectory, mask.to(z.dtype))
    return torch.where(mask, count[trajectory] * grown / total[trajectory].clamp_min(1e-30), 0.0)
