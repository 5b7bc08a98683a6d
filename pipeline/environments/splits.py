"""Which split an initial state belongs to, and finding initial states of a split."""

import hashlib
from itertools import accumulate

import numpy as np

from pipeline.environments.playing import reset, text_of
from pipeline.environments.text_environment import TextEnvironment
from pipeline.workspace.errors import UserError

SPLITS = {"demonstrations": 30, "train": 50, "validation": 10, "test": 10}
"""Per cent of all states, by the hash of the state."""


def split_of(state_key: str) -> str:
    """The split that an initial state belongs to, by a hash of the state itself: equal states never cross splits."""
    digest = hashlib.blake2b(state_key.encode(errors="surrogatepass"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 100
    return next(split for split, most in zip(SPLITS, accumulate(SPLITS.values()), strict=True) if bucket < most)


def initial_states(
    environment: TextEnvironment, split: str, count: int, draws: np.random.Generator, distinct: bool = False
) -> list[int]:
    """State seeds of ``count`` initial states of a split, all of them different ones if ``distinct``.

    The environment is any instance, which is reset; candidate seeds come from ``draws``.

    Raises:
        UserError: fewer than ``count`` such states turned up in 400 tries for each, or see ``reset``.
    """
    found: list[int] = []
    seen: set[str] = set()
    for _ in range(400 * count):
        candidate = int(draws.integers(2**31))
        reset(environment, 0, candidate)
        state = text_of(environment, "state_key")
        if split_of(state) == split and not (distinct and state in seen):
            seen.add(state)
            found.append(candidate)
            if len(found) == count:
                return found
    raise UserError(f"environments: only {len(found)} of {count} initial states found in split {split!r}")
