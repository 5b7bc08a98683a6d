"""Standardising over tokens: the z-score of signals, entropies and whitened advantages."""

import torch
from jaxtyping import Bool, Float, Int
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


def z_score_within(signal: Float[Tensor, " m"], cell: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """``z_score`` among the entries of each cell, of cells numbered from 0."""
    nothing = torch.zeros(int(cell.max()) + 1 if len(cell) else 0, dtype=signal.dtype)
    count = nothing.index_add(0, cell, torch.ones_like(signal)).clamp_min(1)
    centred = signal - (nothing.index_add(0, cell, signal) / count)[cell]
    variance = nothing.index_add(0, cell, centred**2) / count
    return centred / (variance + EPS).sqrt()[cell]
