"""How environments and their experts draw: the initial state apart from the noise, one of several, facts in any order."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def state_draws(noise: np.random.Generator, state_seed: int | None, *apart: int) -> np.random.Generator:
    """Where an initial state is drawn from: its seed if there is one, else the environment's own generator.

    Numbers that keep it ``apart`` make state and noise independent where their seeds are the same number.
    """
    if state_seed is None:
        return noise
    return np.random.default_rng([state_seed, *apart] if apart else state_seed)


def one_of(options: Sequence[T], draws: np.random.Generator) -> T:
    """One of the options, each as likely as the others."""
    return options[int(draws.integers(len(options)))]


def wording(draws: np.random.Generator) -> Callable[..., str]:
    """A function that gives one of the phrases it is given."""
    return lambda *phrases: one_of(phrases, draws)


def spoken(facts: Callable[[], list[str]], words: int, draws: np.random.Generator) -> str:
    """Exactly ``words`` words of facts in random order; asked for again, never in vain, when all have been said."""
    left, said = facts(), list[str]()
    while len(said) < words:
        left = left or facts()
        said += left.pop(int(draws.integers(len(left)))).split()
    return " ".join(said[:words])
