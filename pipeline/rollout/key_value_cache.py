"""The KV cache of the rollout engine: one slot per episode, filled without holes, read at its true length."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.kernels import native
from pipeline.model.trunk import Attend, Heads

TILE = native.LANES
"""Capacity is a multiple of it."""


class SlotCache:
    """Keys and values of some episodes, ``(layers, slots, key-value heads, …)``; grows when a position does not fit.

    For the kernel, keys are in tiles of ``TILE`` tokens with the tokens side by side, so that a tile's scores are made
    of whole vectors and a slot is read front to back; for PyTorch's attention keys are laid out as values are.
    """

    def __init__(self, config: Any, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.num_attention_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        self._shape = (config.num_hidden_layers, slots, groups)
        self._tiled = native.attends(torch.empty(0, self._size, device=device, dtype=dtype))
        self.capacity = 0
        self.keys = self.values = torch.zeros((*self._shape, 0, self._size), device=device, dtype=dtype)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens in every slot."""
        if length <= self.capacity:
            return
        old, self.capacity = self.capacity, max(-(-length // TILE) * TILE, 2 * self.capacity, 8 * TILE)
        values, keys = (self.values.new_zeros((*self._shape, self.capacity, self._size)) for _ in range(2))
        if self._tiled:
            keys = keys.view(*self._shape, self.capacity // TILE, self._size, TILE)
        if old:
            values[:, :, :, :old] = self.values
            keys[:, :, :, : self.keys.shape[3]] = self.keys
        self.keys, self.values = keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Give the first ``length`` tokens of one slot to another."""
        steps = -(-length // TILE) if self._tiled else length  # the rest of a tile is overwritten before it is read
        self.keys[:, target, :, :steps] = self.keys[:, source, :, :steps]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def attention(self, slots: np.ndarray, positions: np.ndarray) -> Attend:
        """Attention of new tokens over their slots, for ``trunk.hidden_states``; stores their keys and values first.

        Slots and positions of the tokens are int64 (n,); a slot's new tokens stand together and in order.

        Raises:
            ValueError: when it attends: keys are not of the shape that the model's configuration says.
        """
        self.reserve(int(positions.max()) + 1)
        inner = self._kernel(slots, positions) if self._tiled else self._torch(slots, positions)

        def attend(layer: int, heads: Heads) -> Tensor:
            if heads.key.shape[1:] != (self._shape[2], self._size):
                sizes = ((self._shape[2], self._size), heads.key.shape[1:])
                held, given = (f"{count} heads of {size}" for count, size in sizes)
                raise ValueError(f"attention has {given} numbers, where the model's configuration says {held}")
            return inner(layer, heads)

        return attend

    def _kernel(self, slots: np.ndarray, positions: np.ndarray) -> Attend:
        def attend(layer: int, heads: Heads) -> Tensor:
            asking = np.arange(len(slots)) if heads.asking is None else heads.asking.numpy()
            held = (self.keys[layer], self.values[layer])
            return native.cached_attention(*heads[:4], *held, slots, positions, asking, heads.scale)

        return attend

    def _torch(self, slots: np.ndarray, positions: np.ndarray) -> Attend:
        """For any device and precision: single tokens in one call, chunks in another, padded to the longest."""
        device = self.keys.device
        slot, position = torch.from_numpy(slots).to(device), torch.from_numpy(positions).to(device)
        starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])
        counts = np.diff(np.r_[starts, len(slots)])
        parts = []
        for chosen in (counts == 1, counts > 1):
            if chosen.any():
                width, count = int(counts[chosen].max()), torch.from_numpy(counts[chosen]).to(device)[:, None]
                offset = torch.arange(width, device=device)
                index = torch.from_numpy(starts[chosen]).to(device)[:, None] + offset.minimum(count - 1)
                length = int(positions[starts[chosen] + counts[chosen] - 1].max()) + 1
                mask = torch.arange(length, device=device) <= position[index][:, None, :, None]
                parts.append((index, offset < count, slot[index[:, 0]], length, mask))

        def attend(layer: int, heads: Heads) -> Tensor:
            query, key, value = heads.everywhere()[:3]
            self.keys[layer, slot, :, position] = key
            self.values[layer, slot, :, position] = value
            out = torch.empty_like(query)
            for index, real, held, length, mask in parts:
                k, v = (kind[layer, held, :, :length] for kind in (self.keys, self.values))
                q = query[index].transpose(1, 2)
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=heads.scale, enable_gqa=True)
                out[index[real]] = mixed.transpose(1, 2)[real]
            return heads.answers(out)

        return attend
