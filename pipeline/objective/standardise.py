"""Standardising over tokens: the z-score of signals, entropies and whitened advantages."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPS = 1e-8
"""Inside the root of the standard deviation."""


def z_score(signal: Float[Tensor, " n"], mask: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``(x - mu) / sigma`` with mean and population standard deviation over the mask; 0 outside it."""
    chosen = signal[mask]
    if len(chosen) == 0:
        return torch.zeros_like(signal)
    sigma = (chosen.var(unbiased=False) + EPS).sqrt()
    return torch.where(mask, (signal - chosen.mean()) / sigma, 0.0)
