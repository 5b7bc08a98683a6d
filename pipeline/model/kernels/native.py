"""The kernels of ``kernels.c`` as functions of tensors.

Everything here has a counterpart in plain PyTorch that is used on other devices, in other precisions, for other head
sizes, where nothing can be compiled, and at shapes where it is the faster of the two.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.model.kernels.library import kernel, library

HEAD_SIZES = (16, 32, 64, 128)
LANES = 16
"""Numbers side by side, however long the processor's vectors: widths are multiples of it, tiles of cached keys as long."""

LONGEST = {
    "avx512": {16: 16384, 32: 16384, 64: 4096, 128: 2048},
    "avx2": {16: 16384, 32: 8192, 64: 2048, 128: 1024},
    "neon": {16: 16384, 32: 2048, 64: 640, 128: 160},
    "baseline": {16: 16384, 32: 2048, 64: 640, 128: 160},
}
"""By instruction set and head size, the length in tokens up to which causal attention with gradients was measured to be
faster here than in PyTorch (docs/performance.md); in longer sequences PyTorch's blocks of keys stay in cache and these do
not. Nothing was measured on NEON: it has what the baseline has and more. The other kernels were faster at every shape
that was measured."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary position codes, each (n, size), as transformers computes them."""


def attends(x: Tensor, shortest: int = 0) -> bool:
    """Whether attention is to be computed here for (…, head size) tensors like this one on this machine.

    The shortest of the whole sequences that attend has ``shortest`` tokens; 0 over a cache. PyTorch pads the others to the
    longest, so it is better only where all are long.
    """
    size = x.shape[-1]
    if size not in HEAD_SIZES or not computes(x):
        return False
    loaded = library()
    return loaded is not None and shortest <= LONGEST[loaded.instruction_set][size]


def computes(x: Tensor) -> bool:
    """Whether there are token-wise kernels for (…, width) tensors like this one on this machine."""
    return x.shape[-1] % LANES == 0 and scores(x)


def scores(x: Tensor) -> bool:
    """Whether there are kernels for (…, vocabulary) logits like these on this machine."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


@dataclass(frozen=True)
class Packing:
    """Which tokens of a packed batch belong together, and which of them ask. All int64, contiguous."""

    offsets: Int[np.ndarray, " e1"]
    """Where each sequence begins, and the end of the last."""
    starts: Int[np.ndarray, " e1"]
    """Where each sequence's queries begin among the queries, and the end of the last."""
    where: Int[np.ndarray, " m"]
    """Each query's place within its sequence, ascending."""


def layout(lengths: Sequence[int] | np.ndarray, asking: Int[np.ndarray, " m"] | None = None) -> Packing:
    """Sequences of these lengths; ``asking`` are the indices of the tokens that ask, None is all."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    asking = np.arange(offsets[-1]) if asking is None else asking
    starts = np.searchsorted(asking, offsets)
    return Packing(offsets, starts, asking - np.repeat(offsets[:-1], np.diff(starts)))


def causal_attention(
    query: Float[Tensor, "m heads size"],
    key: Float[Tensor, "n kv_heads size"],
    value: Float[Tensor, "n kv_heads size"],
    rotation: Rotation | None,
    layout: Packing,
    scale: float,
) -> Float[Tensor, "m heads size"]:
    """Causal attention within sequences, for the tokens that ask; differentiable by query, key and value."""
    return _differentiable(_CausalAttention, query, key, value, rotation, layout, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation | None,
        layout: Packing,
        scale: float,
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out, logsum = torch.empty_like(query), query.new_empty(query.shape[:2])
        _over_sequences("causal_forward", (query, key, value), rotation, layout, scale, (out, logsum))
        if ctx is not None:
            ctx.save_for_backward(query, key, value, out, logsum, *(rotation or ()))
            ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, logsum, *rotation = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(x) for x in (query, key, value))
        rest = (out, logsum, to_out.contiguous(), to_query, to_key, to_value)
        _over_sequences("causal_backward", (query, key, value), tuple(rotation) or None, ctx.layout, ctx.scale, rest)
        return to_query, to_key, to_value, None, None, None


@dataclass(frozen=True)
class Paging:
    """Where a layer's cached keys and values are: in pages of ``length`` tokens, a multiple of ``LANES``.

    All is int64 and contiguous. A page is ``[2][kv_heads][length * size]`` numbers: keys, in tiles ``[length / 16][size][16]``, and values, as
    ``[length][size]``.
    """

    length: int
    addresses: Int[np.ndarray, " pages"]
    """Of each page's first byte."""
    numbers: Int[np.ndarray, "slots width"]
    """Of each slot's pages, in order; what is behind the last is not read."""


def cached_attention(
    query: Float[Tensor, "m heads size"],
    key: Float[Tensor, "n kv_heads size"],
    value: Float[Tensor, "n kv_heads size"],
    rotation: Rotation | None,
    pages: Paging,
    slots: Int[np.ndarray, " n"],
    positions: Int[np.ndarray, " n"],
    asking: Int[np.ndarray, " m"],
    scale: float,
) -> Float[Tensor, "m heads size"]:
    """Store new tokens' keys and values in their slots' pages; attend from those that ask to their slot up to themselves.

    There must be a page for every token up to the last new one of its slot.
    """
    query, new = query.contiguous(), (key.contiguous(), value.contiguous())
    out = torch.empty_like(query)
    run, shape = kernel("cached_forward"), (query.shape[1], key.shape[1], query.shape[2], scale)
    held = (pages.addresses.ctypes.data, pages.numbers.ctypes.data, pages.numbers.shape[1], pages.length)

    def part(first: int, last: int) -> None:
        begin, end = np.searchsorted(asking, (first, last))
        if first == last:
            return
        codes = [x[first].data_ptr() for x in rotation] if rotation else (None, None)
        numbers = np.ascontiguousarray(asking[begin:end] - first)
        run(
            query[begin:].data_ptr(),
            *(x[first].data_ptr() for x in new),
            *codes,
            *held,
            slots[first:].ctypes.data,
            positions[first:].ctypes.data,
            last - first,
            numbers.ctypes.data,
            int(end - begin),
            *shape,
            out[begin:].data_ptr(),
        )

    if torch.get_num_threads() == 1:
        part(0, len(slots))
    else:  # a slot's tokens must not be divided between threads: the later ones attend to the earlier
        _in_threads(part, np.concatenate([[0], np.flatnonzero(np.diff(slots)) + 1, [len(slots)]]))
    return out


def rms_norm(x: Float[Tensor, "*n width"], weight: Float[Tensor, " width"], eps: float) -> Float[Tensor, "*n width"]:
    """``x / sqrt(mean x^2 + eps) * weight`` (arXiv 1910.07467); differentiable."""
    return _differentiable(_RMSNorm, x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _over_rows("rms_norm_forward", (x, out, inverse), weight.data_ptr(), eps)
        if ctx is not None:
            ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        to_out, to_x, to_weight = to_out.contiguous(), torch.empty_like(x), torch.zeros_like(weight)
        rows = [t.data_ptr() for t in (x, inverse, to_out, to_x)]
        # Not in threads: all rows add to the slope of the weight.
        kernel("rms_norm_backward")(*rows, inverse.numel(), x.shape[-1], weight.data_ptr(), to_weight.data_ptr())
        return to_x, to_weight, None


def swiglu(gate: Float[Tensor, "n width"], up: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """``gate / (1 + exp(-gate)) * up`` (arXiv 2002.05202); differentiable."""
    return _differentiable(_SwiGLU, gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _over_rows("swiglu_forward", (gate, up, out))
        if ctx is not None:
            ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        _over_rows("swiglu_backward", (gate, up, to_out.contiguous(), to_gate, to_up))
        return to_gate, to_up


def score(logits: Float[Tensor, "n vocabulary"], tokens: Int[Tensor, " n"], temperature: float) -> list[Tensor]:
    """Raw log-partition, tempered log-partition, log-probability and entropy, each (n,): see ``scoring.score_tokens``."""
    columns = [logits.new_empty(len(logits)) for _ in range(4)]
    _over_rows("score_forward", (logits.contiguous(), tokens.contiguous(), *columns), 1 / temperature)
    return columns


def score_slope(
    logits: Float[Tensor, "n vocabulary"],
    tokens: Int[Tensor, " n"],
    temperature: float,
    raw: Float[Tensor, " n"],
    normaliser: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"],
    slopes: Sequence[Float[Tensor, " n"]],
) -> Float[Tensor, "n vocabulary"]:
    """A loss's slope by contiguous logits, in their place, from its slopes by log-probability, entropy, log-partition."""
    columns = [x.contiguous() for x in (tokens, raw, normaliser, entropy, *slopes)]
    _over_rows("score_backward", (logits, *columns), 1 / temperature)
    return logits


def sample(
    logits: Float[Tensor, "n vocabulary"], temperature: float, draws: Float[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Token, log-probability and entropy: see ``transformers_engine.sample``."""
    kinds = (torch.int64, torch.float32, torch.float32)
    token, logprob, entropy = (torch.empty(len(logits), dtype=kind) for kind in kinds)
    columns = (logits.contiguous(), draws.contiguous(), token, logprob, entropy)
    _over_rows("sample_forward", columns, 1 / temperature)
    return token, logprob, entropy


def _differentiable(function: Any, *arguments: Any) -> Tensor:
    """Without gradients the function is called past autograd, which costs more than a small batch does."""
    out: Tensor = function.apply(*arguments) if torch.is_grad_enabled() else function.forward(None, *arguments)
    return out


def _over_rows(name: str, tensors: Sequence[Tensor], *settings: Any) -> None:
    """Call a kernel over rows. The first tensor is (…, width); the others have a row or a number for each of its rows."""
    run, width = kernel(name), tensors[0].shape[-1]
    strides = [t.element_size() * (width if t.dim() == tensors[0].dim() else 1) for t in tensors]

    def part(first: int, last: int) -> None:
        rows = [t.data_ptr() + stride * first for t, stride in zip(tensors, strides, strict=True)]
        run(*rows, last - first, width, *settings)

    _in_threads(part, np.arange(tensors[0].numel() // width + 1), tensors[0].numel())


def _over_sequences(
    name: str,
    tensors: tuple[Tensor, ...],
    rotation: Rotation | None,
    layout: Packing,
    scale: float,
    rest: tuple[Tensor, ...],
) -> None:
    run, shape = kernel(name), (tensors[0].shape[1], tensors[1].shape[1], tensors[0].shape[2], scale)
    codes = [x.data_ptr() for x in rotation] if rotation else [None, None]

    def part(first: int, last: int) -> None:
        begin, end = np.searchsorted(layout.offsets, (first, last))
        inputs, outputs = ([x.data_ptr() for x in group] for group in (tensors, rest))
        borders = (layout.offsets[begin:].ctypes.data, layout.starts[begin:].ctypes.data, layout.where.ctypes.data)
        run(*inputs, *codes, *borders, int(end - begin), *shape, *outputs)

    _in_threads(part, layout.offsets)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _in_threads(part: Callable[[int, int], None], borders: np.ndarray, numbers: int | None = None) -> None:
    """Call ``part(first, last)`` for consecutive stretches between borders, as many as PyTorch has threads.

    Passes over few ``numbers`` are over before another thread is awake.
    """
    threads = torch.get_num_threads()
    total = int(borders[-1])
    if threads == 1 or len(borders) <= threads or (numbers is not None and numbers < 2**21):
        part(0, total)
        return
    cuts = borders[np.searchsorted(borders, np.linspace(0, total, threads + 1))]
    list(_pool(os.getpid(), threads).map(part, cuts[:-1].tolist(), cuts[1:].tolist()))
