"""Slot S6: terms added to the loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kl_penalty(logprob: Float[Tensor, " n"], ref_logprob: Float[Tensor, " n"], estimator: str) -> Float[Tensor, " n"]:
    """Estimators of KL(pi || ref) from tokens sampled by pi, with ``d = log pi - log ref``.

    * ``k1``: ``d``, unbiased; as a loss its expected gradient on-policy is zero.
    * ``k2``: ``d^2 / 2``, biased, with the KL's gradient.
    * ``k3``: ``exp(-d) - 1 + d``, unbiased and never negative.

    Source: J. Schulman, "Approximating KL divergence", 2020; arXiv 2402.03300, eq. 4 (k3).
    """
    difference = logprob - ref_logprob
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    return torch.exp(-difference) - 1 + difference


def value_loss(
    values: Float[Tensor, " n"], old_values: Float[Tensor, " n"], returns: Float[Tensor, " n"], clip: float | None
) -> Float[Tensor, " n"]:
    """``0.5 (V - R)^2``; with ``clip``, the larger of that and the loss at V held within ``clip`` of its old value.

    Source: arXiv 1707.06347, section 5, as in OpenAI's baselines.
    """
    loss = 0.5 * (values - returns) ** 2
    if clip is None:
        return loss
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(loss, 0.5 * (held - returns) ** 2)
