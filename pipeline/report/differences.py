"""Differences between methods in words: what every table, text, page and figure writes of one."""

from pipeline.analysis.power import least_seeds
from pipeline.analysis.verdicts import ALPHA, Difference
from pipeline.settings.params import Family


def difference_text(difference: Difference, against: str = "") -> str:
    """The value with its interval, p and verdict, as far as it has them; of a single seed the value alone.

    ``against`` are words after the numbers.
    """
    if difference.interval is None:
        return f"{difference.value:+.3f} ({len(difference.by_seed)} seed{'s' * (len(difference.by_seed) > 1)}){against}"
    low, high = difference.interval
    text = f"{difference.value:+.3f} [{low:+.3f}, {high:+.3f}]{against}"
    if difference.p_adjusted is None:
        return text
    text += f" p_adj {p_text(difference.p_adjusted)}"
    alarmed = f" (alarms in {', '.join(difference.alarmed)})" if difference.alarmed else ""
    return text if difference.verdict is None else f"{text}: {difference.verdict}{alarmed}"


def p_text(p: float) -> str:
    """A p value with three digits."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def seeds_advice(size: int, family: Family = "holm", key: str = "seeds") -> str:
    """Why differences are not put in words, and what to do about it, in a family of that size."""
    least = least_seeds(size, ALPHA, family)
    return f"no verdict below {least} paired seeds: give `{key}` {least} or more"
