"""What an intervention on reasoning shows: success in each way, how far it falls, and whether reasoning is used.

There is one policy, so initial states are the units: episodes of one state are averaged first, and differences are paired by
state.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from pipeline.settings.params import Config
from pipeline.workspace.files import read_record
from pipeline.workspace.layout import Layout

Values = Float[np.ndarray, " states"]
"""Success per initial state, in [0, 1], or a difference of two such."""

FALL = 0.2
"""Least fall of success, cut or swapped, by which reasoning is called used."""


def intervention(
    environment: str, reasoning: str | None, found: Mapping[float, Mapping[str, Values]]
) -> dict[str, Any]:
    """What was found at each temperature, the headline first, in the ways own, none and other; JSON-ready.

    Returns:
        ``environment``; ``reasoning``, the kind of the demonstrations, None if there were none; ``temperatures``, for each
        the ``temperature``, ``own``, ``none`` and ``other`` (``success`` with a 95 % interval, ``ci_low`` and ``ci_high``,
        None with a single state), ``none_minus_own`` and ``other_minus_own`` (likewise, with ``value``); ``used``, whether
        at the headline temperature success falls by at least ``FALL`` without the policy's own reasoning, both ways, and
        the intervals of both differences lie below zero; and ``verdict``, that in a sentence.
    """
    rows = [{"temperature": temperature, **_row(ways)} for temperature, ways in found.items()]
    headline = rows[0]
    used = all(_falls(headline[f"{way}_minus_own"]) for way in ("none", "other"))
    own, none, other = (f"{headline[way]['success']:.3f}" for way in ("own", "none", "other"))
    verdict = (
        f"Reasoning is {'used' if used else 'not shown to be used'}: at temperature {headline['temperature']:g} success is "
        f"{own} with the policy's own, {none} without any and {other} with that of an episode of another state."
    )
    return {
        "environment": environment,
        "reasoning": reasoning,
        "temperatures": rows,
        "used": used,
        "verdict": verdict,
    }


def read_interventions(config: Config, layout: Layout) -> dict[str, Any]:
    """Environment -> what ``intervention`` found there, of those that have been made.

    Raises:
        UserError: a file is damaged.
    """
    files = {name: layout.interventions(name) for name in config.environments}
    return {name: read_record(file) for name, file in files.items() if file.exists()}


def _row(ways: Mapping[str, Values]) -> dict[str, Any]:
    row: dict[str, Any] = {way: _estimate(values, "success") for way, values in ways.items()}
    return row | {f"{way}_minus_own": _estimate(ways[way] - ways["own"], "value") for way in ("none", "other")}


def _estimate(values: Values, name: str) -> dict[str, float | None]:
    """Mean over states and its 95 % t-interval, to six decimals, so that equal results are equal text."""
    low = high = None
    if len(values) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))
        low, high = (round(float(values.mean()) + side * half, 6) + 0.0 for side in (-1, 1))
    return {name: round(float(values.mean()), 6) + 0.0, "ci_low": low, "ci_high": high}


def _falls(difference: Mapping[str, float | None]) -> bool:
    value, high = difference["value"], difference["ci_high"]
    return value is not None and high is not None and value <= -FALL and high < 0
