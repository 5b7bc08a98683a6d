"""The Action Bottleneck of several environments side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.analysis.bottleneck import SCOPES
from pipeline.report.tables import Table


def bottleneck_table(
    name: str, found: Mapping[str, Mapping[str, Any]], responses: Mapping[str, Sequence[str]]
) -> Table:
    """A row per environment, from what ``analysis.bottleneck.bottleneck`` gave and what the turns' responses were."""
    rows = []
    for environment, one in found.items():
        turns = responses[environment]
        varying = one["groups"] - one["zero_variance_groups"]
        sizes = [f"{one['groups']} × {one['group_size']}", f"{varying}", f"{turns.count('valid') / len(turns):.0%}"]
        rows.append([environment, *sizes, f"{one['success']:.3f}", *(coefficient(one[scope]) for scope in SCOPES)])
    header = ["environment", "groups × size", "that vary", "valid turns", "success", *SCOPES]
    title = (
        f"`{name}`: Spearman's correlation of a group's mean token energy with the variance of its returns, by tokens "
        "[95 % interval over groups]"
    )
    return Table(title, header, rows)


def coefficient(found: Mapping[str, Any]) -> str:
    """A rank correlation with its interval."""
    if found["spearman"] is None:
        return "undefined"
    low, high = found["ci_low"], found["ci_high"]
    interval = "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{found['spearman']:+.2f}{interval}"
