"""One forward pass over packed tokens: many sequences, or many pieces of sequences, side by side and without padding.

Everything but attention works token by token, so tokens of any number of sequences are one flat batch; attention alone
must know which belong together, and is given by the caller: over the whole sequences (``attention.packed_attention``: training,
annotation) or over a cache (``pipeline.rollout.key_value_cache``: sampling). The Qwen2 and Llama families have a forward of our
own here; other transformers models run their own, with the same attention put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.model.attention import Attend, Heads, plain_attention
from pipeline.model.kernels import native
from pipeline.model.shards import gathered

Linear = Callable[[Tensor, Any], Tensor]
"""What a linear map, maybe with an adapter, gives for some rows."""

OWN_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
"""Model types with pre-normalised layers of rotary attention and SwiGLU."""


def hidden_states(
    backbone: Any,
    ids: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    attend: Attend,
    wanted: Int[Tensor, " m"] | None = None,
    linear: Linear | None = None,
) -> Float[Tensor, "m width"]:
    """Last hidden states of a packed batch, by a transformers model without its output head.

    ``wanted`` are ascending indices of the tokens whose states are asked for; in the last layer only their queries, and
    nothing else behind them, is computed. None is all. ``linear`` computes the projections of a forward of our own, in place
    of ``project``.
    """
    if has_own_forward(backbone):
        return _own_forward(backbone, ids, positions, attend, wanted, linear or project)
    hidden = _transformers_forward(backbone, ids, positions, attend)
    return hidden if wanted is None else hidden[wanted]


def has_own_forward(backbone: Any) -> bool:
    """Whether ``hidden_states`` computes this model itself: one of ``OWN_FAMILIES``, with plain attention, its projections
    linear, maybe adapted."""
    config = backbone.config
    return (
        config.model_type in OWN_FAMILIES
        and config.hidden_act == "silu"
        and plain_attention(config)
        and all(_is_linear(p) for layer in backbone.layers for p in projections(layer))
    )


def projections(layer: Any) -> tuple[Any, ...]:
    """The linear maps of a layer of ``OWN_FAMILIES``, maybe adapted."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _own_forward(
    backbone: Any, ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None, linear: Linear
) -> Float[Tensor, "m width"]:
    x = F.embedding(ids, backbone.embed_tokens.weight, backbone.embed_tokens.padding_idx)
    cos, sin = (part[0] for part in backbone.rotary_emb(x, positions.unsqueeze(0)))

    def run(number: int, layer: Any, x: Tensor) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        y = _rms_norm(x, layer.input_layernorm)
        k, v = (_heads(linear(y, p), attention.head_dim) for p in (attention.k_proj, attention.v_proj))
        asking = wanted if number == len(backbone.layers) - 1 else None
        if asking is not None:
            x, y = x[asking], y[asking]
        q = _heads(linear(y, attention.q_proj), attention.head_dim)
        if hasattr(attention, "q_norm"):
            q, k = (_rms_norm(x, n).to(v.dtype) for x, n in ((q, attention.q_norm), (k, attention.k_norm)))
        mixed = attend(number, Heads(q, k, v, (cos, sin), attention.scaling, asking)).flatten(1)
        x = x + linear(mixed, attention.o_proj)
        y = _rms_norm(x, layer.post_attention_layernorm)
        gate, up = linear(y, mlp.gate_proj), linear(y, mlp.up_proj)
        return x + linear(_swiglu(gate, up), mlp.down_proj)

    for number, layer in enumerate(backbone.layers):
        again = layer.gradient_checkpointing and torch.is_grad_enabled()
        step = partial(run, number, layer)
        x = gathered(layer, partial(_recomputed, step) if again else step, x)
    return _rms_norm(x, backbone.norm)


def _recomputed(layer: Callable[..., Any], *inputs: Tensor) -> Any:
    """What a layer gives, of which nothing is kept for the backward pass but its inputs."""
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


def _heads(x: Tensor, size: int) -> Float[Tensor, "n heads size"]:
    return x.view(len(x), x.shape[1] // size, size)


def _is_linear(projection: Any) -> bool:
    return type(getattr(projection, "base_layer", projection)) is nn.Linear


def project(x: Tensor, projection: Any) -> Tensor:
    """A linear map, maybe with an adapter: what peft's module computes, in fewer passes over memory."""
    linear = getattr(projection, "base_layer", projection)
    y = F.linear(x, linear.weight, linear.bias)
    if linear is projection:
        return y
    a, b = (part["default"].weight for part in (projection.lora_A, projection.lora_B))
    added = torch.addmm(y.to(a.dtype), F.linear(x.to(a.dtype), a), b.t(), alpha=projection.scaling["default"])
    return added.to(y.dtype)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    if native.computes(x):
        return native.rms_norm(x, norm.weight, norm.variance_epsilon)
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return native.swiglu(gate, up) if native.computes(gate) else F.silu(gate) * up


def _transformers_forward(backbone: Any, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    with _packed(backbone):
        output = backbone(
            input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, attend=attend
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@contextmanager
def _packed(backbone: Any) -> Iterator[None]:
    """Meanwhile a transformers model has the packed attention, also where its layers are recomputed."""
    config, usual = backbone.config, backbone.config._attn_implementation
    recomputing: list[Any] = [
        layer
        for layer in backbone.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]
    modes = [layer.training for layer in recomputing]

    def again(layer: Callable[..., Any], *inputs: Tensor) -> Any:
        def run(*inputs: Tensor) -> Any:
            with _packed(backbone):
                return layer(*inputs)

        return _recomputed(run, *inputs)

    config._attn_implementation = "packed"
    for layer in recomputing:  # transformers would do it in training mode alone, with the attention of then
        layer._gradient_checkpointing_func = again
        layer.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        config._attn_implementation = usual
        for layer, mode in zip(recomputing, modes, strict=True):
            layer.training = mode


_NO_PART = ("dropout", "position_ids", "cache_position")
"""What models tell their attention in vain: policies have no dropout, and positions are in queries and keys already."""


def _attend_in_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    attend: Attend,
    sliding_window: int | None = None,
    softcap: float | None = None,
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
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # under autocast they may differ
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = Heads(q, k, v, None, scale, window=sliding_window, cap=softcap)
    return attend(module.layer_idx, heads).unsqueeze(0), None


AttentionInterface.register("packed", _attend_in_transformers)
