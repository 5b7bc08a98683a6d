"""Attention over packed tokens: over whole sequences side by side, or by a mask; what a model's layers attend to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.model.kernels import native
from pipeline.model.kernels.native import Rotation


class Heads(NamedTuple):
    """What one layer's attention works on: the tokens of a packed batch."""

    query: Float[Tensor, "m heads size"]
    key: Float[Tensor, "n kv_heads size"]
    value: Float[Tensor, "n kv_heads size"]
    rotation: Rotation | None
    """Rotary position codes that are still to be applied to query and key, if any."""
    scale: float
    asking: Int[Tensor, " m"] | None = None
    """Ascending indices of the tokens whose queries are given; None is all."""
    window: int | None = None
    """A token attends to so many tokens, itself the last of them; None is to all before it."""
    cap: float | None = None
    """Scores s become ``cap tanh(s / cap)``; None leaves them."""

    def everywhere(self) -> Heads:
        """Rotated, and with a query for every token, for PyTorch's attention: zeros where nobody asks."""
        query = self.query
        if self.asking is not None:
            query = query.new_zeros((len(self.key), *query.shape[1:])).index_copy(0, self.asking, query)
        return Heads(_rotate(query, self.rotation), _rotate(self.key, self.rotation), self.value, None, self.scale)

    def answers(self, mixed: Float[Tensor, "n heads size"]) -> Float[Tensor, "m heads size"]:
        """Those of the asking tokens."""
        return mixed if self.asking is None else mixed[self.asking]


Attend = Callable[[int, Heads], Tensor]
"""``attend(layer, heads)`` mixes values: (m, heads, size)."""


def packed_attention(lengths: Sequence[int] | np.ndarray, device: torch.device) -> Attend:
    """Causal attention within each of the sequences that are packed one after another."""
    everyone, shortest, longest = native.layout(lengths), int(np.min(lengths)), int(np.max(lengths))
    padded = lru_cache(maxsize=1)(lambda: padded_attention(np.asarray(lengths), device))

    def attend(layer: int, heads: Heads) -> Tensor:
        if heads.window is not None and heads.window >= longest:
            heads = heads._replace(window=None)
        plain = heads.window is None and heads.cap is None
        if not plain or not native.attends(heads.query, shortest):
            return padded()(layer, heads)
        asking = heads.asking
        layout = everyone if asking is None else native.layout(lengths, asking.numpy())
        return native.causal_attention(*heads[:4], layout, heads.scale)

    return attend


def padded_attention(lengths: np.ndarray, device: torch.device) -> Attend:
    """The same for any device and precision: the sequences are brought side by side for PyTorch's attention.

    Padding stands behind each sequence, where causality hides it, so only windows need a mask; give sequences of similar
    length. Caps are PyTorch's operations, which hold all scores of a layer.
    """
    longest = int(lengths.max())
    inside = np.arange(longest) < lengths[:, None]
    starts = np.r_[0, np.cumsum(lengths)[:-1]]
    index = torch.from_numpy(np.where(inside, starts[:, None] + np.arange(longest), 0)).to(device)
    real = torch.from_numpy(np.flatnonzero(inside)).to(device)
    seen = lru_cache(maxsize=2)(lambda window: _seen(longest, window, device))

    def attend(layer: int, heads: Heads) -> Tensor:
        q, k, v = (x[index].transpose(1, 2) for x in heads.everywhere()[:3])
        if heads.window is None and heads.cap is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale, enable_gqa=True)
        else:
            out = attend_masked(q, k, v, seen(heads.window), heads.scale, heads.cap)
        return heads.answers(out.transpose(1, 2).reshape(-1, *heads.query.shape[1:])[real])

    return attend


def plain_attention(config: Any) -> bool:
    """Whether every layer attends to everything before it, uncapped: no soft cap, no window below the model's positions."""
    window, positions = window_of(config), getattr(config, "max_position_embeddings", None)
    seen = window is None or (positions is not None and window >= positions)
    return seen and getattr(config, "attn_logit_softcapping", None) is None


def window_of(config: Any) -> int | None:
    """Tokens that the narrowest layer's attention looks back, itself included; None: all."""
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] if getattr(config, "use_sliding_window", True) else []
    found = [getattr(config, key, None) for kind, key in sizes.items() if kind in kinds]
    return min((size for size in found if size), default=None)


def _seen(length: int, window: int | None, device: torch.device) -> Bool[Tensor, "n n"]:
    """Which tokens (columns) each token (row) of a sequence attends to."""
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril() if window is None else everything.tril().triu(1 - window)


def attend_masked(
    query: Float[Tensor, "n heads tokens size"],
    key: Float[Tensor, "n kv_heads longest size"],
    value: Float[Tensor, "n kv_heads longest size"],
    mask: Bool[Tensor, "*n tokens longest"],
    scale: float,
    cap: float | None,
) -> Float[Tensor, "n heads tokens size"]:
    """Attention to what a mask says, of scores s that become ``cap tanh(s / cap)`` where there is a cap (arXiv 2408.00118)."""
    if cap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    scores = cap * torch.tanh(query @ key.transpose(2, 3) * scale / cap)
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1, dtype=precision)
    return weights.to(value.dtype) @ value


def _rotate(x: Float[Tensor, "n heads size"], rotation: Rotation | None) -> Float[Tensor, "n heads size"]:
    """Apply rotary position codes, ``x cos + rotate_half(x) sin`` (arXiv 2104.09864), if there are any."""
    if rotation is None:
        return x
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
