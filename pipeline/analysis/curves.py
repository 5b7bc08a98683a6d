"""Learning curves as arrays: what was measured, at what cost, and its mean and range over seeds."""

from collections.abc import Mapping

import numpy as np

Curves = Mapping[str, list[dict[str, float]]]
"""Seed -> one row per iteration."""

SMOOTHING = 5
"""Iterations of the centred moving mean over training success."""


def series_of(curves: Curves, key: str) -> np.ndarray:
    """Values of a key, (seeds, iterations) up to the shortest seed's last; NaN where a row has none."""
    length = min(len(rows) for rows in curves.values())
    return np.array([[row.get(key, np.nan) for row in rows[:length]] for rows in curves.values()], dtype=float)


def costs(tokens: int | None, timed: bool) -> list[str]:
    """What trainings spend, that first that they end by: tokens if there is a budget of them, else iterations."""
    known = ["iterations", "episodes", "tokens", *(["seconds"] if timed else [])]
    return known if tokens is None else sorted(known, key=lambda cost: cost != "tokens")


def uneven(curves: Curves) -> bool:
    """Whether some seeds were trained for more iterations than others."""
    return len({len(rows) for rows in curves.values()}) > 1


def spent(curves: Curves, timings: Curves | None, cost: str) -> np.ndarray:
    """Mean over seeds of what had been spent before iteration 0, 1, ... and after the shortest seed's last."""
    length = min(len(rows) for rows in curves.values())
    total = np.array([seed[:length] for seed in _spent(curves, timings, cost)]).mean(axis=0)
    return np.concatenate([[0.0], total])


def validations(curves: Curves, timings: Curves | None, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Where and what the validations were, means over seeds: before training, where all seeds were validated, at the end.

    Seeds of different lengths have their ends, and the validations there, in different iterations: those are one point.
    """
    before = series_of(curves, "validation_success_before")[:, :1]
    values = np.concatenate([before, series_of(curves, "validation_success")], axis=1).mean(axis=0)
    made = np.isfinite(values)
    x, y = spent(curves, timings, cost)[made], values[made]
    if not uneven(curves):
        return x, y
    end = np.mean([seed[-1] for seed in _spent(curves, timings, cost)])
    last = np.mean([rows[-1].get("validation_success", np.nan) for rows in curves.values()])
    return np.append(x, end), np.append(y, last)


def _spent(curves: Curves, timings: Curves | None, cost: str) -> list[np.ndarray]:
    """What each seed had spent after its iteration 0, 1, ..."""
    if cost == "seconds" and timings is not None:
        return [np.array([row["seconds"] for row in rows]) for rows in timings.values()]
    return [np.cumsum([1.0 if cost == "iterations" else row[cost] for row in rows]) for rows in curves.values()]


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
