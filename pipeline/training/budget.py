"""How long a training goes on: for so many iterations, or until it has sampled so many tokens."""

from collections.abc import Mapping, Sequence

from pipeline.settings.train import Train

Rows = Sequence[Mapping[str, float]]
"""A learning curve so far: one row of metrics per finished iteration."""


def training_over(curve: Rows, train: Train) -> bool:
    """Whether a training has made its last iteration.

    With ``train.tokens`` that is the one whose end comes nearest to the budget: another one, as large as the last, would
    lead further away from it. ``train.iterations`` ends a training in any case.
    """
    if len(curve) >= train.iterations or train.tokens is None or not curve:
        return len(curve) >= train.iterations
    return sampled_tokens(curve) >= train.tokens - curve[-1]["tokens"] / 2


def progress(curve: Rows, train: Train) -> tuple[int, int]:
    """What a training has spent and may spend: sampled tokens where they are budgeted, else iterations."""
    if train.tokens is None:
        return len(curve), train.iterations
    return sampled_tokens(curve), train.tokens


def sampled_tokens(curve: Rows) -> int:
    """Tokens that a training has sampled so far."""
    return int(sum(row["tokens"] for row in curve))
