"""Every random draw has a name: a generator seeded from (seed, stream, counters), never global state."""

import hashlib

import numpy as np


def generator(seed: int, stream: str, *counters: int | str) -> np.random.Generator:
    """A counter-based generator (Philox): equal names give equal draws on every machine and in every process.

    A name is the run's seed, what the draws are for, e.g. ``"tokens"``, and e.g. iteration and episode.
    """
    return np.random.Generator(np.random.Philox(key=key(seed, stream, *counters)))


def key(seed: int, stream: str, *counters: int | str) -> int:
    """128-bit key of a name (BLAKE2b of its parts)."""
    name = "\x1f".join(map(str, (seed, stream, *counters)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
