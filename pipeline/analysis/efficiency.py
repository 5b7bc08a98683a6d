"""Sample efficiency: how much success for how many sampled tokens, from the validations during training.

Two numbers of a training: the area under its validation curve, and the tokens after which the curve first reaches a
threshold. Validations are of one training each, so a difference is over paired seeds alone: a t-interval, and the p of
``verdicts.difference_p``. They are beside the verdict and have none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.analysis.curves import Curves
from pipeline.analysis.scores import rounded, shared, significant
from pipeline.analysis.verdicts import Difference, measure


class Points(NamedTuple):
    """A training's validations, from before it to its end; (points,) each."""

    tokens: np.ndarray
    """Sampled so far."""
    success: np.ndarray


def points(rows: Sequence[Mapping[str, float]]) -> Points | None:
    """A training's validations; None if it has fewer than two."""
    tokens = np.cumsum([row["tokens"] for row in rows])
    first = [(0.0, row["validation_success_before"]) for row in rows[:1] if "validation_success_before" in row]
    later = [
        (spent, row["validation_success"])
        for spent, row in zip(tokens, rows, strict=True)
        if "validation_success" in row
    ]
    found = np.array([*first, *later], dtype=float)
    return Points(found[:, 0], found[:, 1]) if len(found) > 1 else None


def area(curve: Points, end: float) -> float:
    """Mean success up to ``end`` tokens, by trapezoids; flat before the first validation and after the last."""
    tokens, success = curve
    places = np.concatenate([[0.0], tokens[(tokens > 0) & (tokens < end)], [end]])
    return float(np.trapezoid(np.interp(places, tokens, success), places) / end)


def tokens_to(curve: Points, threshold: float) -> float | None:
    """Tokens at which the curve first reaches the threshold, between validations in a straight line; None if it does not."""
    tokens, success = curve
    above = np.flatnonzero(success >= threshold)
    if not len(above):
        return None
    at = int(above[0])
    if at == 0:
        return float(tokens[0])
    share = (threshold - success[at - 1]) / (success[at] - success[at - 1])
    return float(tokens[at - 1] + share * (tokens[at] - tokens[at - 1]))


def threshold_of(curves: Sequence[Curves]) -> float | None:
    """Half way from the reference policy's validation success to the best method's at its end, both means over seeds.

    None without validations, or if no method ends above the reference policy.
    """
    found = [[points(rows) for rows in curve.values()] for curve in curves]
    if not found or any(one is None for method in found for one in method):
        return None
    ends = [float(np.mean([one.success[-1] for one in method if one is not None])) for method in found]
    start = float(np.mean([one.success[0] for method in found for one in method if one is not None]))
    return (start + max(ends)) / 2 if max(ends) > start else None


def compared(mine: Curves, theirs: Curves, threshold: float | None) -> dict[str, Any]:
    """Both numbers of one method minus those of another, over their common seeds; null where they have none.

    ``auc`` is in success, up to where the shortest of these trainings ends. ``tokens_to_threshold`` is in tokens, and
    compared only if every paired seed of both methods reached the threshold; ``reached`` says how many did.
    """
    names = shared(tuple(mine), tuple(theirs), "seed")
    pairs = [(points(mine[name]), points(theirs[name])) for name in names]
    whole = [(x, y) for x, y in pairs if x is not None and y is not None]
    if len(whole) < len(pairs):
        return {"auc": None, "tokens_to_threshold": None}
    end = min(curve.tokens[-1] for pair in whole for curve in pair)
    areas = _difference([area(x, end) - area(y, end) for x, y in whole])
    return {
        "auc": {"value": rounded(areas.value), **_test(areas), "tokens": rounded(end), "seeds": len(whole)},
        "tokens_to_threshold": None if threshold is None else _to_threshold(whole, threshold),
    }


def _to_threshold(pairs: Sequence[tuple[Points, Points]], threshold: float) -> dict[str, Any]:
    times = [(tokens_to(x, threshold), tokens_to(y, threshold)) for x, y in pairs]
    both = [x - y for x, y in times if x is not None and y is not None]
    found = _difference(both) if len(both) == len(times) else None
    return {
        "value": None if found is None else rounded(found.value),
        **_test(found),
        "threshold": rounded(threshold),
        "seeds": len(times),
        "reached": sum(x is not None for x, _ in times),
        "against_reached": sum(y is not None for _, y in times),
    }


def _difference(by_seed: Sequence[float]) -> Difference:
    """One number per seed: a grid of a single column."""
    return measure(np.array(by_seed)[:, None])


def _test(found: Difference | None) -> dict[str, float | None]:
    low, high = (found.interval if found is not None else None) or (None, None)
    p = None if found is None else found.p
    return {"ci_low": rounded(low), "ci_high": rounded(high), "p": significant(p)}
