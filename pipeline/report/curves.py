"""Learning curves as arrays: what was measured, at what cost, and its mean and range over seeds."""

from __future__ import annotations

import numpy as np

from pipeline.report.comparison import Curves

SMOOTHING = 5
"""Iterations of the centred moving mean over training success."""
HEALTH = {
    "entropy_action": "Entropy of action tokens (nats)",
    "entropy_reasoning": "Entropy of reasoning tokens (nats)",
    "kl_reference": "KL to the reference (nats per token)",
    "gradient_norm": "Gradient norm before clipping",
    "clip_fraction": "Share of tokens clipped",
    "gradient_share_action": "Share of |c A| on action tokens",
}
"""Keys of the learning curves that show whether a training is healthy, and what they are."""


def series_of(curves: Curves, key: str) -> np.ndarray:
    """Values of a key, (seeds, iterations) up to the shortest seed's last; NaN where a row has none."""
    length = min(len(rows) for rows in curves.values())
    return np.array([[row.get(key, np.nan) for row in rows[:length]] for rows in curves.values()], dtype=float)


def spent(curves: Curves, timings: Curves | None, cost: str) -> np.ndarray:
    """Mean over seeds of what had been spent before iteration 0, 1, ... and after the last; (iterations + 1,)."""
    length = series_of(curves, "iteration").shape[1]
    if cost == "iterations":
        return np.arange(length + 1, dtype=float)
    if cost == "seconds" and timings is not None:
        total = series_of(timings, "seconds").mean(axis=0)[:length]
    else:
        total = series_of(curves, cost).cumsum(axis=1).mean(axis=0)
    return np.concatenate([[0.0], total])


def validations(curves: Curves, spent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where and what the validations were, the one before training included."""
    before = series_of(curves, "validation_success_before")[:, :1]
    values = np.concatenate([before, series_of(curves, "validation_success")], axis=1).mean(axis=0)
    made = np.isfinite(values)
    return spent[made], values[made]


def smoothed(series: np.ndarray) -> np.ndarray:
    """Centred moving mean along iterations, over fewer of them at the ends; NaN is left out."""
    window = np.ones(min(SMOOTHING, series.shape[1]))
    known = np.isfinite(series)
    rows = zip(np.where(known, series, 0.0), known.astype(float), strict=True)
    pairs = [(np.convolve(values, window, "same"), np.convolve(there, window, "same")) for values, there in rows]
    return np.array([total / np.where(count > 0, count, np.nan) for total, count in pairs])


def over_seeds(series: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest seed, (iterations,) each; NaN where no seed has a value."""
    known = np.isfinite(series)
    count = known.sum(axis=0)
    mean = np.where(known, series, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    low, high = np.where(known, series, np.inf).min(axis=0), np.where(known, series, -np.inf).max(axis=0)
    return mean, np.where(count > 0, low, np.nan), np.where(count > 0, high, np.nan)
