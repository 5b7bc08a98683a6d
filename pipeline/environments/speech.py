"""How scripted experts fill their reasoning with facts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.environments.draws import one_of


def spoken(facts: Callable[[], list[str]], words: int, draws: np.random.Generator) -> str:
    """Facts in random order until there are ``words`` words; asked for again when all have been said.

    Args:
        facts: gives a non-empty list, in words that ``draws`` may vary.
        words: exactly so many, at least 0.
        draws: choose the order.
    """
    left, said = facts(), list[str]()
    while len(said) < words:
        left = left or facts()
        said += left.pop(int(draws.integers(len(left)))).split()
    return " ".join(said[:words])


def wording(draws: np.random.Generator) -> Callable[..., str]:
    """A function that gives one of the phrases it is given."""
    return lambda *phrases: one_of(phrases, draws)
