"""A beginning that several sequences share is computed once: the prompt of a group, the turns before a branch.

Of each sequence only what stands behind its longest common beginning with another is computed. Everything but attention
works on these tokens alone; attention is given the keys and values of whole sequences, gathered from the tokens that
computed them, and their gradients add up there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor

from pipeline.model.attention import Attend, Heads
from pipeline.model.kernels.native import Rotation

LEAST_WIDTH = 256
"""Width of hidden states from which a beginning is shared. A token's arithmetic grows with its square, what gathering costs
with the width itself; and the published results of small policies from scratch keep their order of sums."""
LEAST_SAVED = 0.1
"""Share of all tokens that must be saved: keys and values of the others are gathered too."""
MOST_READ = 4
"""How many times its budget of computed tokens a batch's padded size may be: attention reads whole sequences."""


class Sharing(NamedTuple):
    """Which of the n tokens of some sequences, one after another, are computed, and where the others get theirs."""

    computed: Int[np.ndarray, " m"]
    """Ascending indices of the tokens that are computed."""
    source: Int[np.ndarray, " n"]
    """For each token the number, among the computed ones, of the one that stands for it."""


def sharing(sequences: Sequence[np.ndarray], width: int) -> Sharing | None:
    """What sequences share under a model of this width; None where sharing does not pay."""
    if width < LEAST_WIDTH or len(sequences) < 2:
        return None
    shared = shared_tokens(sequences)
    return shared if len(shared.computed) <= (1 - LEAST_SAVED) * len(shared.source) else None


def shared_tokens(sequences: Sequence[np.ndarray]) -> Sharing:
    """Tokens are one where their sequences agree up to and with them."""
    order, common = _by_beginning(sequences)
    offsets = np.cumsum([0, *map(len, sequences)])
    own, twin = np.ones(offsets[-1], dtype=bool), np.arange(offsets[-1])
    for (before, after), length in zip(itertools.pairwise(order), common[1:], strict=True):
        start = offsets[after]
        own[start : start + length] = False
        twin[start : start + length] = twin[offsets[before] : offsets[before] + length]
    return Sharing(np.flatnonzero(own), (np.cumsum(own) - 1)[twin])


def prefix_batches(sequences: Sequence[np.ndarray], budget: int) -> list[np.ndarray]:
    """Partition sequences into batches that compute at most ``budget`` tokens, those with a common beginning side by side.

    The padded size of a batch is at most ``MOST_READ`` times the budget. A sequence longer than the budget may be a batch of
    its own.
    """
    batches, computed, longest = list[list[int]](), 0, 0
    for index, common in zip(*_by_beginning(sequences), strict=True):
        length = len(sequences[index])
        computed, longest = computed + length - common, max(longest, length)
        if not batches or computed > budget or (len(batches[-1]) + 1) * longest > MOST_READ * budget:
            batches.append([])
            computed = longest = length
        batches[-1].append(index)
    return [np.array(batch) for batch in batches]


def _by_beginning(sequences: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """The sequences in lexicographic order, and how many tokens each has in common with the one before, 0 for the first.

    None before has more in common with it than that.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">i8").tobytes())
    common = [0] * len(order)
    for place, (before, own) in enumerate(itertools.pairwise(order), start=1):
        shorter = min(len(sequences[before]), len(sequences[own]))
        differ = sequences[before][:shorter] != sequences[own][:shorter]
        common[place] = int(differ.argmax()) if differ.any() else shorter
    return order, common


def gathered(attend: Attend, computed: Int[Tensor, " m"], source: Int[Tensor, " n"]) -> Attend:
    """Attention over whole sequences for layers that have only the computed tokens (see ``Sharing``)."""

    @lru_cache(maxsize=1)  # the codes of one layer are those of the next
    def codes(cos: Tensor, sin: Tensor) -> Rotation:
        return cos[source], sin[source]

    def over_all(layer: int, heads: Heads) -> Tensor:
        asking = computed if heads.asking is None else computed[heads.asking]
        rotation = None if heads.rotation is None else codes(*heads.rotation)
        key, value = heads.key[source], heads.value[source]
        return attend(layer, heads._replace(key=key, value=value, rotation=rotation, asking=asking))

    return over_all
