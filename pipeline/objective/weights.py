"""Slot S4: the token weight w_t."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import TokenBatch
from pipeline.trajectory import Role

EPS = 1e-8
"""Inside the root of the standard deviation of the z-score."""


def uniform_weights(batch: TokenBatch) -> Float[Tensor, " n"]:
    """1 on trainable tokens, 0 elsewhere."""
    return batch.trainable.float()


def z_score(signal: Float[Tensor, " n"], mask: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``(x - mu) / sigma`` with mean and population standard deviation over the mask; 0 outside it."""
    chosen = signal[mask]
    if len(chosen) == 0:
        return torch.zeros_like(signal)
    sigma = (chosen.var(unbiased=False) + EPS).sqrt()
    return torch.where(mask, (signal - chosen.mean()) / sigma, 0.0)


def signal_values(batch: TokenBatch, signal: str) -> Float[Tensor, " n"]:
    """The signals of the ablation (arXiv 2605.14558), higher where more weight shall go."""
    return {
        "reference_energy": lambda: batch.energy,
        "reference_entropy": lambda: batch.ref_entropy,
        "behaviour_nll": lambda: -batch.logprob,
        "logprob_shift": lambda: batch.logprob - batch.ref_logprob,
    }[signal]()


def actfocus_weights(
    batch: TokenBatch,
    *,
    alpha: float,
    beta: float,
    tau: float,
    form: str,
    signal: str,
    think_tag: float | None = None,
    answer_tag: float = 1.0,
    malformed: float | None = None,
) -> Float[Tensor, " n"]:
    """ActFocus (arXiv 2605.14558): downweight reasoning, redistribute among action tokens by token energy.

    Reasoning tokens weigh ``alpha``; action tokens weigh, with z the signal's z-score over all action tokens of the batch,

    * ``sigmoid``: ``1 + beta * sigmoid(z / tau)`` (the paper's at tau = 1);
    * ``softmax``: ``(1 - beta) + beta * n_act * softmax(z / tau)`` over the n_act action tokens of one trajectory, whose
      total stays n_act.

    Args:
        batch: the episodes that passed the filter, before they are split into minibatches.
        alpha: reasoning downweight, at least 0.
        beta: redistribution strength, at least 0 (at most 1 for softmax).
        tau: redistribution temperature, greater than 0.
        form: ``sigmoid`` or ``softmax``.
        signal: see ``signal_values``.
        think_tag: weight of think tags; None is alpha.
        answer_tag: weight of answer tags.
        malformed: weight of text that has left the format; None is alpha.

    Returns:
        Weights, 0 where not trainable.
    """
    action = batch.of(Role.ACTION)
    z = z_score(signal_values(batch, signal), action) / tau
    if form == "sigmoid":
        raised = 1 + beta * torch.sigmoid(z)
    else:
        raised = (1 - beta) + beta * _share_of_trajectory(z, action, batch.trajectory, batch.trajectories)
    fixed = {
        Role.REASONING: alpha,
        Role.THINK_TAG: alpha if think_tag is None else think_tag,
        Role.ANSWER_TAG: answer_tag,
        Role.OTHER: alpha if malformed is None else malformed,
    }
    weights = torch.where(action, raised, 0.0)
    for role, weight in fixed.items():
        weights = torch.where(batch.of(role), weight, weights)
    return weights


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
