"""Importance weights for tokens that were not sampled from quite the policy that an update begins with."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.settings.correction import Correction


class Factors(NamedTuple):
    """What corrects the surrogate of each token."""

    factor: Float[Tensor, " n"]
    """1 where not trainable."""
    touched: Bool[Tensor, " n"]
    """Whether the ratio was out of bounds, so that the factor is not the ratio."""


def importance_factors(
    trained: Float[Tensor, " n"],
    sampled: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    section: Correction,
) -> Factors:
    """``r = pi(a) / mu(a)``, bounded: pi is the trained policy before the update, mu what has sampled; a constant to gradients.

    Log-probabilities of the tokens are of pi (``trained``) and of mu (``sampled``), at one temperature. With the level
    ``sequence`` r is the product over an episode's trainable tokens, the same for all of them.

    ``truncate``: ``min(r, high)``, truncated importance sampling per token (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"). ``mask``: r where ``low <= r <= high``, else 0: IcePop per token (arXiv
    2512.16144, eq. 1), masked importance sampling per sequence with ``low`` 0 (Liu et al. 2025, "When Speed Kills Stability:
    Demystifying RL Collapse from the Training-Inference Mismatch"). The loss is divided by what it is divided by without
    factors, as in these.
    """
    logarithm = torch.where(trainable, trained.double() - sampled.double(), 0.0)
    if section.level == "sequence":
        episodes = int(trajectory.max()) + 1 if len(trajectory) else 0
        logarithm = logarithm.new_zeros(episodes).index_add(0, trajectory, logarithm)[trajectory]
    ratio = torch.where(trainable, logarithm, 0.0).exp()
    above, below = ratio > section.high, ratio < section.low
    if section.kind == "truncate":
        return Factors(ratio.clamp_max(section.high).to(trained.dtype), above)
    return Factors(torch.where(above | below, 0.0, ratio).to(trained.dtype), above | below)
