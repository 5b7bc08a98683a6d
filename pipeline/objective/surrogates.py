"""Slot S5: ratio and advantage to a per-token loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SurrogateLoss(NamedTuple):
    """Loss per token, and which tokens lost their gradient to clipping."""

    loss: Float[Tensor, " n"]
    clipped: Bool[Tensor, " n"]


def ppo_clip(
    logprob: Float[Tensor, " n"],
    logprob_old: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    *,
    low: float,
    high: float,
) -> SurrogateLoss:
    """PPO's clipped surrogate with two bounds (arXiv 1707.06347, eq. 7; arXiv 2503.14476).

    ``-min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(log pi - log pi_old)``.
    """
    ratio = torch.exp(logprob - logprob_old)
    plain = ratio * advantage
    bounded = ratio.clamp(1 - low, 1 + high) * advantage
    return SurrogateLoss(-torch.minimum(plain, bounded), bounded < plain)
