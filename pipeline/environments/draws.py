"""How environments and their experts draw: the initial state apart from the noise, and one of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def state_draws(noise: np.random.Generator, options: dict[str, Any] | None, *apart: int) -> np.random.Generator:
    """Where ``reset`` draws an initial state from: ``options["state_seed"]`` if it is given, else the noise itself.

    Args:
        noise: the environment's own generator, which ``seed`` has begun.
        options: what ``reset`` was given.
        apart: a number more, which keeps state and noise independent where their seeds are the same number.
    """
    state_seed = (options or {}).get("state_seed")
    return noise if state_seed is None else np.random.default_rng([state_seed, *apart])


def one_of(options: Sequence[T], draws: np.random.Generator) -> T:
    """One of the options, each as likely as the others."""
    return options[int(draws.integers(len(options)))]
