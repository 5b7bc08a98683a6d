"""One forward pass over packed tokens: many sequences, or many pieces of sequences, side by side and without padding.

Everything but attention works token by token, so tokens of any number of sequences are one flat batch; attention alone
must know which belong together, and is given by the caller: over the whole sequences (``packed_attention``: training,
annotation) or over a cache (``pipeline.rollout.key_value_cache``: sampling). The Qwen2 and Llama families have a forward of our
own here; other transformers models run their own, with the same attention put in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

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

OWN_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
"""Model types with pre-normalised layers of rotary attention and SwiGLU."""


def hidden_states(
    backbone: Any,
    ids: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    attend: Attend,
    wanted: Int[Tensor, " m"] | None = None,
) -> Float[Tensor, "m width"]:
    """Last hidden states of a packed batch, by a transformers model without its output head.

    ``wanted`` are ascending indices of the tokens whose states are asked for; in the last layer only their queries, and
    nothing else behind them, is computed. None is all.
    """
    if has_own_forward(backbone):
        return _own_forward(backbone, ids, positions, attend, wanted)
    hidden = _transformers_forward(backbone, ids, positions, attend)
    return hidden if wanted is None else hidden[wanted]


def packed_attention(lengths: Sequence[int] | np.ndarray, device: torch.device) -> Attend:
    """Causal attention within each of the sequences that are packed one after another."""
    everyone, shortest = native.layout(lengths), int(np.min(lengths))
    padded = lru_cache(maxsize=1)(lambda: padded_attention(np.asarray(lengths), device))

    def attend(layer: int, heads: Heads) -> Tensor:
        if not native.attends(heads.query, shortest):
            return padded()(layer, heads)
        asking = heads.asking
        layout = everyone if asking is None else native.layout(lengths, asking.numpy())
        return native.causal_attention(*heads[:4], layout, heads.scale)

    return attend


def padded_attention(lengths: np.ndarray, device: torch.device) -> Attend:
    """The same for any device and precision: the sequences are brought side by side for PyTorch's attention.

    Padding stands behind each sequence, where causality hides it, so no mask is needed; give sequences of similar length.
    """
    longest = int(lengths.max())
    inside = np.arange(longest) < lengths[:, None]
    starts = np.r_[0, np.cumsum(lengths)[:-1]]
    index = torch.from_numpy(np.where(inside, starts[:, None] + np.arange(longest), 0)).to(device)
    real = torch.from_numpy(np.flatnonzero(inside)).to(device)

    def attend(layer: int, heads: Heads) -> Tensor:
        q, k, v = (x[index].transpose(1, 2) for x in heads.everywhere()[:3])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale, enable_gqa=True)
        return heads.answers(out.transpose(1, 2).reshape(-1, *heads.query.shape[1:])[real])

    return attend


def has_own_forward(backbone: Any) -> bool:
    """Whether ``hidden_states`` computes this model itself: one of ``OWN_FAMILIES``, nothing put around its projections."""
    config = backbone.config
    return (
        config.model_type in OWN_FAMILIES
        and config.hidden_act == "silu"
        and all(type(p) is nn.Linear for layer in backbone.layers for p in _projections(layer))
    )


def _projections(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _own_forward(
    backbone: Any, ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None
) -> Float[Tensor, "m width"]:
    x = F.embedding(ids, backbone.embed_tokens.weight, backbone.embed_tokens.padding_idx)
    cos, sin = (part[0] for part in backbone.rotary_emb(x, positions.unsqueeze(0)))
    for number, layer in enumerate(backbone.layers):
        attention, mlp = layer.self_attn, layer.mlp
        y = _rms_norm(x, layer.input_layernorm)
        k, v = (_heads(y, p, attention.head_dim) for p in (attention.k_proj, attention.v_proj))
        asking = wanted if number == len(backbone.layers) - 1 else None
        if asking is not None:
            x, y = x[asking], y[asking]
        q = _heads(y, attention.q_proj, attention.head_dim)
        if hasattr(attention, "q_norm"):
            q, k = _rms_norm(q, attention.q_norm), _rms_norm(k, attention.k_norm)
        mixed = attend(number, Heads(q, k, v, (cos, sin), attention.scaling, asking)).flatten(1)
        x = x + F.linear(mixed, attention.o_proj.weight, attention.o_proj.bias)
        y = _rms_norm(x, layer.post_attention_layernorm)
        gate, up = (F.linear(y, p.weight, p.bias) for p in (mlp.gate_proj, mlp.up_proj))
        x = x + F.linear(_swiglu(gate, up), mlp.down_proj.weight, mlp.down_proj.bias)
    return _rms_norm(x, backbone.norm)


def _heads(x: Tensor, projection: Any, size: int) -> Float[Tensor, "n heads size"]:
    projected = F.linear(x, projection.weight, projection.bias)
    return projected.view(len(x), projection.out_features // size, size)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    if native.computes(x):
        return native.rms_norm(x, norm.weight, norm.variance_epsilon)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return native.swiglu(gate, up) if native.computes(gate) else F.silu(gate) * up


def _rotate(x: Float[Tensor, "n heads size"], rotation: Rotation | None) -> Float[Tensor, "n heads size"]:
    """Apply rotary position codes, ``x cos + rotate_half(x) sin`` (arXiv 2104.09864), if there are any."""
    if rotation is None:
        return x
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _transformers_forward(backbone: Any, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    config, usual = backbone.config, backbone.config._attn_implementation
    config._attn_implementation = "packed"
    try:
        output = backbone(
            input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, attend=attend
        )
    finally:
        config._attn_implementation = usual
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


_NO_PART = ("dropout", "sliding_window", "position_ids", "cache_position")
"""What models tell their attention in vain: policies have no dropout, and ``load_policy`` refuses windows."""


def _attend_in_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    attend: Attend,
    **others: Any,
) -> tuple[Tensor, None]:
    """``Attend`` as transformers calls it: (1, heads, n, size) in, (1, n, heads, size) out.

    Raises:
        ValueError: this attention is not ``Attend``: it looks ahead, or is made of more than queries, keys and values.
    """
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError("its attention looks ahead")
    known = {name for name, x in others.items() if name in _NO_PART or x is None or isinstance(x, bool)}
    more = [*sorted(others.keys() - known), *(["a mask of its own"] if attention_mask is not None else [])]
    if more:
        raise ValueError(f"its attention is given {', '.join(more)}, which is not supported")
    if key.shape != value.shape:
        raise ValueError(f"its attention has keys of {key.shape[-1]} numbers and values of {value.shape[-1]}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module.layer_idx, Heads(q, k, v, None, scale)).unsqueeze(0), None


AttentionInterface.register("packed", _attend_in_transformers)
