"""The KV cache of the rollout engine: one slot per episode, filled without holes, read at its true length.

A slot is a row of pages. Slots that begin with the same tokens hold the same pages; who is to write into a page that
others hold gets a copy of it first.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.model.attention import Attend, Heads, attend_masked, plain_attention
from pipeline.model.kernels import native
from pipeline.rollout.pages import Pages
from pipeline.workspace.errors import UserError

PAGE = 4 * native.LANES
"""Tokens whose keys and values, of all layers, are in a page."""


class SlotCache:
    """Keys and values of some episodes, in at most so many gigabytes (of 10^9 bytes).

    A page has of each layer keys, and values behind them. For the kernel, keys are in tiles of 16 tokens with the tokens
    side by side, so that a tile's scores are made of whole vectors and a page is read front to back; for PyTorch's
    attention both are (tokens, key-value heads, size).
    """

    def __init__(
        self, config: Any, slots: int, device: torch.device, dtype: torch.dtype, gigabytes: float = math.inf
    ) -> None:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        self.device, self.dtype, self._gigabytes = device, dtype, gigabytes
        self._tiled = native.attends(torch.empty(0, size, device=device, dtype=dtype)) and plain_attention(config)
        self._shape = (2, PAGE, groups, size)
        numbers = math.prod(self._shape)
        self._page_gigabytes = layers * numbers * dtype.itemsize / 1e9
        limit = int(min(gigabytes / self._page_gigabytes, sys.maxsize))
        self.pages = Pages(layers, numbers, limit, device, dtype)
        self._numbers = np.full((slots, 0), -1, dtype=np.int64)
        """Of each slot's pages, in order; -1 behind the last."""
        self.room = [0] * slots
        """Up to which length new tokens can be written to the end of each slot without another ``reserve``."""

    def episodes(self, tokens: int) -> int:
        """How many of so many tokens fit, if they have nothing in common.

        Raises:
            UserError: not a single one.
        """
        wanted = math.ceil(tokens / PAGE)
        if wanted > self.pages.limit:
            least = math.ceil(1e4 * wanted * self._page_gigabytes) / 1e4
            raise UserError(
                f"rollout.cache_gigabytes: {self._gigabytes:.3g} GB hold keys and values of {self.pages.limit * PAGE} tokens, "
                f"and an episode may have {tokens} (context_tokens); at least {least:g} are needed"
            )
        return self.pages.limit // wanted

    def reserve(self, slot: int, start: int, end: int) -> bool:
        """Let the tokens from ``start`` to ``end`` be written to a slot that holds those before: in pages of its own.

        False where there are not enough pages; then nothing has changed.
        """
        first, last = start // PAGE, -(-end // PAGE)
        if last > self._numbers.shape[1]:
            more = max(last, 2 * self._numbers.shape[1]) - self._numbers.shape[1]
            self._numbers = np.pad(self._numbers, ((0, 0), (0, more)), constant_values=-1)
        held = self._numbers[slot]
        wanted = [at for at in range(first, last) if held[at] < 0 or self.pages.holders[held[at]] > 1]
        if len(wanted) > self.pages.left:
            return False
        for at in wanted:
            old = held[at : at + 1].copy()
            held[at] = self.pages.take(None if old < 0 else int(old[0]))
            self.pages.give_back(old[old >= 0])
        self.room[slot] = last * PAGE
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first ``length`` tokens of another, or of itself, and nothing else."""
        shared = self._numbers[source, : -(-length // PAGE)].copy()
        self.pages.share(shared)
        self.drop(target)
        self._numbers[target, : len(shared)] = shared
        self.room[source] = 0

    def drop(self, slot: int) -> None:
        """Give up all that a slot holds."""
        held = self._numbers[slot]
        self.pages.give_back(held[held >= 0])
        held[:] = -1
        self.room[slot] = 0

    def attention(self, slots: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> Attend:
        """Attention of new tokens over their slots, for ``trunk.hidden_states``; stores their keys and values first.

        Slots and positions of the tokens are int64 (n,); a slot's new tokens stand together and in order.

        Raises:
            ValueError: there is no room for a token; when it attends: keys are not of the shape that the model's
                configuration says.
        """
        if positions.max() >= PAGE * self._numbers.shape[1]:
            raise ValueError("there is no room for a token's keys and values; reserve it")
        pages = self._numbers[slots, positions // PAGE]
        if pages.min() < 0 or self.pages.holders[pages].max() > 1:
            raise ValueError("there is no room for a token's keys and values; reserve it")
        inner = self._kernel(slots, positions) if self._tiled else self._torch(slots, positions, pages)
        expected = self._shape[-2:]

        def attend(layer: int, heads: Heads) -> Tensor:
            if heads.key.shape[1:] != expected:
                held, given = (f"{count} heads of {size}" for count, size in (expected, heads.key.shape[1:]))
                raise ValueError(f"attention has {given} numbers, where the model's configuration says {held}")
            return inner(layer, heads)

        return attend

    def _kernel(self, slots: np.ndarray, positions: np.ndarray) -> Attend:
        paging = [native.Paging(PAGE, addresses, self._numbers) for addresses in self.pages.addresses]

        def attend(layer: int, heads: Heads) -> Tensor:
            asking = np.arange(len(slots)) if heads.asking is None else heads.asking.numpy()
            return native.cached_attention(*heads[:4], paging[layer], slots, positions, asking, heads.scale)

        return attend

    def _torch(self, slots: np.ndarray, positions: np.ndarray, pages: np.ndarray) -> Attend:
        """For any device and precision: single tokens in one call, chunks in another, padded to the longest."""
        places = self.pages.places(pages)
        offset = torch.from_numpy(positions % PAGE).to(self.device)
        starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])
        counts = np.diff(np.r_[starts, len(slots)])
        parts = [
            _Part(self, slots, positions, starts[chosen], counts[chosen])
            for chosen in (counts == 1, counts > 1)
            if chosen.any()
        ]

        def attend(layer: int, heads: Heads) -> Tensor:
            query, key, value = heads.everywhere()[:3]
            for chunk, which, page in places:
                for kind, new in enumerate((key, value)):
                    self.layer_of(chunk, layer, kind)[page, offset[which]] = new[which]
            out = torch.empty_like(query)
            for part in parts:
                q, (k, v) = query[part.index].transpose(1, 2), part.held(layer)
                mixed = attend_masked(q, k, v, part.mask(heads.window), heads.scale, heads.cap)
                out[part.index[part.real]] = mixed.transpose(1, 2)[part.real]
            return heads.answers(out)

        return attend

    def layer_of(self, chunk: Tensor, layer: int, kind: int) -> Float[Tensor, "pages time kv_heads size"]:
        """A layer's keys (kind 0) or values (kind 1) in some pages, as they are kept for PyTorch."""
        return chunk[layer].view(-1, *self._shape)[:, kind]


class _Part:
    """Slots whose new tokens attend together in PyTorch, and what they attend to, side by side.

    ``starts`` and ``counts`` say where each slot's new tokens are in the batch.
    """

    def __init__(
        self, cache: SlotCache, slots: np.ndarray, positions: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> None:
        width, count = int(counts.max()), torch.from_numpy(counts).to(cache.device)[:, None]
        offset = torch.arange(width, device=cache.device)
        self.index = torch.from_numpy(starts).to(cache.device)[:, None] + offset.minimum(count - 1)
        """(slots, tokens) in the batch; the last one again where a slot has fewer."""
        self.real = offset < count
        self._cache, self._length = cache, int(positions[starts + counts - 1].max()) + 1
        self._position = torch.from_numpy(positions).to(cache.device)[self.index][:, None, :, None]
        pages = cache._numbers[slots[starts], : -(-self._length // PAGE)]
        self._shape = pages.shape
        self._places = cache.pages.places(np.where(pages < 0, pages[:, :1], pages).ravel())  # what is there is not seen
        self.mask = lru_cache(maxsize=None)(self._mask)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots, each (slots, key-value heads, longest, size)."""
        return self._held(layer, 0), self._held(layer, 1)

    def _held(self, layer: int, kind: int) -> Float[Tensor, "slots kv_heads longest size"]:
        found = [(which, self._cache.layer_of(chunk, layer, kind)[page]) for chunk, which, page in self._places]
        pages = found[0][1]
        if len(found) > 1:
            pages = pages.new_empty((math.prod(self._shape), *pages.shape[1:]))
            for which, part in found:
                pages[which] = part
        return pages.view(self._shape[0], -1, *pages.shape[2:])[:, : self._length].transpose(1, 2)

    def _mask(self, window: int | None) -> Bool[Tensor, "slots 1 tokens longest"]:
        """What each token sees: itself and what is before it, within a window if there is one."""
        at = torch.arange(self._length, device=self._position.device)
        seen = at <= self._position
        return seen if window is None else seen & (at > self._position - window)
