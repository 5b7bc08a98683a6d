"""Differences between methods in words: what every table, text, page and figure writes of one."""

from pipeline.analysis.statistics import VERDICT_SEEDS, Difference

NO_VERDICT = f"no verdict below {VERDICT_SEEDS} paired seeds"
"""Why a difference is not put in words."""


def difference_text(difference: Difference, against: str = "") -> str:
    """The value with its interval and verdict; without one, with its range over the paired seeds.

    ``against`` are words after the numbers.
    """
    seeds, words = difference.by_seed, difference.verdict
    if words is not None and difference.interval is not None:
        low, high = difference.interval
        return f"{difference.value:+.3f} [{low:+.3f}, {high:+.3f}]{against}: {words}"
    if len(seeds) == 1:
        return f"{difference.value:+.3f} (1 seed){against}"
    return f"{difference.value:+.3f} ({len(seeds)} seeds, {min(seeds):+.3f} to {max(seeds):+.3f}){against}"
