"""Memory in pages of equal size: handed out, shared, given back. It grows with what is asked for and never moves."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

LEAST_GROWTH = 16
"""Pages that are made together at least; later half as many as there are, so that there are few pieces of memory."""


class Pages:
    """At most ``limit`` pages of so many ``numbers`` in each of the ``layers``; zeros, or a copy, when they are taken.

    A page has one holder or several, and is free again when the last one gives it back. A layer's part of neighbouring
    pages stands together: they are read one after another.
    """

    def __init__(self, layers: int, numbers: int, limit: int, device: torch.device, dtype: torch.dtype) -> None:
        self.limit, self._like = limit, torch.empty((layers, 0, numbers), device=device, dtype=dtype)
        self.chunks: list[Tensor] = []
        """(layers, pages, numbers) each; the pages are numbered through all of them."""
        self.addresses = np.zeros((layers, 0), dtype=np.int64)
        """Of the first byte of each layer's part of each page."""
        self.holders = np.zeros(0, dtype=np.int64)
        """Of each page, how many."""
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return len(self.holders) - len(self._free)

    @property
    def left(self) -> int:
        """Pages that can still be taken."""
        return self.limit - self.used

    def take(self, copied: int | None = None) -> int:
        """A page with one holder: zeros, or a copy of another. There must be one ``left``."""
        if not self._free:
            self._grow()
        page = self._free.pop()
        self.holders[page] = 1
        if copied is None:
            self._memory(page).zero_()
        else:
            self._memory(page).copy_(self._memory(copied))
        return page

    def share(self, pages: Int[np.ndarray, " n"]) -> None:
        """Each of them, all different, has another holder now."""
        self.holders[pages] += 1

    def give_back(self, pages: Int[np.ndarray, " n"]) -> None:
        """Each of them, all different, has a holder less."""
        self.holders[pages] -= 1
        self._free += pages[self.holders[pages] == 0].tolist()

    def places(self, pages: Int[np.ndarray, " n"]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Chunk by chunk, the chunk, which of these pages are in it, and which of its pages they are."""
        starts = np.cumsum([0, *(chunk.shape[1] for chunk in self.chunks)])
        chunk = np.searchsorted(starts, pages, side="right") - 1
        found = []
        for number in np.unique(chunk).tolist():
            which = np.flatnonzero(chunk == number)
            indices = (torch.from_numpy(x).to(self._like.device) for x in (which, pages[which] - starts[number]))
            found.append((self.chunks[number], *indices))
        return found

    def _memory(self, page: int) -> Tensor:
        for chunk in self.chunks:
            if page < chunk.shape[1]:
                return chunk[:, page]
            page -= chunk.shape[1]
        raise IndexError(page)

    def _grow(self) -> None:
        made = len(self.holders)
        count = min(max(LEAST_GROWTH, made // 2), self.limit - made)
        layers, _, numbers = self._like.shape
        chunk = self._like.new_empty((layers, count, numbers))
        self.chunks.append(chunk)
        begins = chunk.data_ptr() + np.arange(layers * count).reshape(layers, count) * (numbers * chunk.element_size())
        self.addresses = np.concatenate([self.addresses, begins], axis=1)
        self.holders = np.concatenate([self.holders, np.zeros(count, dtype=np.int64)])
        self._free += range(made + count - 1, made - 1, -1)
