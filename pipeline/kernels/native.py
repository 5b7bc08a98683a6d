"""Compiles ``kernels.c`` with the machine's C compiler, once, and calls it; without a compiler it is not available.

Everything here has a counterpart in plain PyTorch that is used on other devices, in other precisions, for other head
sizes, and where nothing can be compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 128)
LANES = 16
"""Numbers in a vector; the time axis of cached keys is in tiles of as many."""
SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary position codes, each (n, size), as transformers computes them."""

_ADDRESS, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SHAPE = [_INT, _INT, _INT, _FLOAT]
_SIGNATURES = {
    "causal_forward": [*[_ADDRESS] * 8, _COUNT, *_SHAPE, *[_ADDRESS] * 2],
    "causal_backward": [*[_ADDRESS] * 8, _COUNT, *_SHAPE, *[_ADDRESS] * 6],
    "cached_forward": [*[_ADDRESS] * 9, _COUNT, _ADDRESS, _COUNT, _COUNT, *_SHAPE, _ADDRESS],
    "rms_norm_forward": [*[_ADDRESS] * 2, _COUNT, _COUNT, _FLOAT, *[_ADDRESS] * 2],
    "rms_norm_backward": [*[_ADDRESS] * 4, _COUNT, _COUNT, *[_ADDRESS] * 2],
    "swiglu_forward": [*[_ADDRESS] * 2, _COUNT, _ADDRESS],
    "swiglu_backward": [*[_ADDRESS] * 3, _COUNT, *[_ADDRESS] * 2],
    "score_forward": [*[_ADDRESS] * 2, _COUNT, _COUNT, _FLOAT, *[_ADDRESS] * 4],
    "score_backward": [*[_ADDRESS] * 2, _COUNT, _COUNT, _FLOAT, *[_ADDRESS] * 6],
    "sample_forward": [_ADDRESS, _COUNT, _COUNT, _FLOAT, *[_ADDRESS] * 4],
}


def attends(x: Tensor) -> bool:
    """Whether there is an attention kernel for (…, head size) tensors like this one on this machine."""
    return x.shape[-1] in HEAD_SIZES and computes(x)


def computes(x: Tensor) -> bool:
    """Whether there are token-wise kernels for (…, width) tensors like this one on this machine."""
    return x.shape[-1] % LANES == 0 and scores(x)


def scores(x: Tensor) -> bool:
    """Whether there are kernels for (…, vocabulary) logits like these on this machine."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if there is no C compiler, or ``ACTFOCUS_KERNELS=off`` is in the environment."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("ACTFOCUS_KERNELS") == "off":
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    processor = platform.machine().encode() + _processor_flags()
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, processor, *map(str.encode, FLAGS)])).hexdigest()
    for folder in (SOURCE.parent / "__pycache__", Path(tempfile.gettempdir()) / f"actfocus-{os.getuid()}"):
        target = folder / f"kernels-{key[:16]}.so"
        try:
            if not target.exists():
                _compile(compiler, target)
            loaded = ctypes.CDLL(str(target))
            for name, types in _SIGNATURES.items():
                getattr(loaded, name).argtypes, getattr(loaded, name).restype = types, None
            return loaded
        except OSError:  # a folder that cannot be written to, or not executed from
            continue
        except subprocess.CalledProcessError:  # a compiler without vector extensions
            return None
    return None


def _processor_flags() -> bytes:
    """What -march=native depends on: a library is not to be used on another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return platform.processor().encode()


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")  # processes may compile at once; the last one wins, all are equal
    subprocess.run([compiler, *FLAGS, "-o", partial, SOURCE, "-lm"], capture_output=True, check=True)
    partial.replace(target)


@dataclass(frozen=True)
class Layout:
    """Which tokens of a packed batch belong together, and which of them ask. All int64, contiguous."""

    offsets: Int[np.ndarray, " e1"]
    """Where each sequence begins, and the end of the last."""
    starts: Int[np.ndarray, " e1"]
    """Where each sequence's queries begin among the queries, and the end of the last."""
    where: Int[np.ndarray, " m"]
    """Each query's place within its sequence, ascending."""


def layout(lengths: Sequence[int] | np.ndarray, asking: Int[np.ndarray, " m"] | None = None) -> Layout:
    """Sequences of these lengths; ``asking`` are the indices of the tokens that ask, None is all."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    asking = np.arange(offsets[-1]) if asking is None else asking
    starts = np.searchsorted(asking, offsets)
    return Layout(offsets, starts, asking - np.repeat(offsets[:-1], np.diff(starts)))


def causal_attention(
    query: Float[Tensor, "m heads size"],
    key: Float[Tensor, "n kv_heads size"],
    value: Float[Tensor, "n kv_heads size"],
    rotation: Rotation | None,
    layout: Layout,
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
        layout: Layout,
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


def cached_attention(
    query: Float[Tensor, "m heads size"],
    key: Float[Tensor, "n kv_heads size"],
    value: Float[Tensor, "n kv_heads size"],
    rotation: Rotation | None,
    keys: Float[Tensor, "slots kv_heads tiles size 16"],
    values: Float[Tensor, "slots kv_heads time size"],
    slots: Int[np.ndarray, " n"],
    positions: Int[np.ndarray, " n"],
    asking: Int[np.ndarray, " m"],
    scale: float,
) -> Float[Tensor, "m heads size"]:
    """Store new tokens' keys and values in their slots, and attend from those that ask to their slot up to themselves."""
    query, new = query.contiguous(), (key.contiguous(), value.contiguous())
    out = torch.empty_like(query)
    kernel, shape = _kernel("cached_forward"), (query.shape[1], key.shape[1], query.shape[2], scale)

    def part(first: int, last: int) -> None:
        begin, end = np.searchsorted(asking, (first, last))
        if first == last:
            return
        codes = [x[first].data_ptr() for x in rotation] if rotation else (None, None)
        numbers = np.ascontiguousarray(asking[begin:end] - first)
        kernel(
            query[begin:].data_ptr(),
            *(x[first].data_ptr() for x in new),
            *codes,
            keys.data_ptr(),
            values.data_ptr(),
            slots[first:].ctypes.data,
            positions[first:].ctypes.data,
            last - first,
            numbers.ctypes.data,
            int(end - begin),
            values.shape[2],
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
        x, width, kernel = x.contiguous(), x.shape[-1], _kernel("rms_norm_forward")
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        address = [t.data_ptr() for t in (x, out, inverse)]

        def part(first: int, last: int) -> None:
            row, one = 4 * width * first, 4 * first
            kernel(address[0] + row, weight.data_ptr(), last - first, width, eps, address[1] + row, address[2] + one)

        _in_threads(part, np.arange(inverse.numel() + 1), x.numel())
        if ctx is not None:
            ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        to_out, to_x, to_weight = to_out.contiguous(), torch.empty_like(x), torch.zeros_like(weight)
        addresses = (t.data_ptr() for t in (x, weight, inverse, to_out))
        _kernel("rms_norm_backward")(*addresses, inverse.numel(), x.shape[-1], to_x.data_ptr(), to_weight.data_ptr())
        return to_x, to_weight, None


def swiglu(gate: Float[Tensor, "n width"], up: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """``gate / (1 + exp(-gate)) * up`` (arXiv 2002.05202); differentiable."""
    return _differentiable(_SwiGLU, gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _elementwise("swiglu_forward", (gate, up), (out,))
        if ctx is not None:
            ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        _elementwise("swiglu_backward", (gate, up, to_out.contiguous()), (to_gate, to_up))
        return to_gate, to_up


def score(logits: Float[Tensor, "n vocabulary"], tokens: Int[Tensor, " n"], temperature: float) -> list[Tensor]:
    """Raw log-partition, tempered log-partition, log-probability and entropy, each (n,): see ``scoring.score_tokens``."""
    logits, tokens = logits.contiguous(), tokens.contiguous()
    columns = [logits.new_empty(len(logits)) for _ in range(4)]
    inputs = (logits, tokens)
    _over_rows("score_forward", inputs, (logits.shape[1], 1 / temperature), columns)
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
    """A loss's slope by the logits, in their place, from its slopes by log-probability, entropy and log-partition."""
    rest = [x.contiguous() for x in (raw, normaliser, entropy, *slopes)]
    _over_rows("score_backward", (logits, tokens.contiguous()), (logits.shape[1], 1 / temperature), rest)
    return logits


def sample(
    logits: Float[Tensor, "n vocabulary"], temperature: float, draws: Float[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Token, log-probability and entropy: see ``transformers_engine.sample``."""
    logits, count = logits.contiguous(), len(logits)
    token, logprob, entropy = (torch.empty(count, dtype=kind) for kind in (torch.int64, torch.float32, torch.float32))
    rest = (draws.contiguous(), token, logprob, entropy)
    _over_rows("sample_forward", (logits,), (logits.shape[1], 1 / temperature), rest)
    return token, logprob, entropy


def _over_rows(name: str, inputs: Sequence[Tensor], settings: tuple[int, float], rest: Sequence[Tensor]) -> None:
    kernel = _kernel(name)

    def part(first: int, last: int) -> None:
        if last > first:
            sources, others = ([x[first].data_ptr() for x in group] for group in (inputs, rest))
            kernel(*sources, last - first, *settings, *others)

    _in_threads(part, np.arange(len(inputs[0]) + 1), inputs[0].numel())


def _differentiable(function: Any, *arguments: Any) -> Tensor:
    """Without gradients the function is called past autograd, which costs more than a small batch does."""
    out: Tensor = function.apply(*arguments) if torch.is_grad_enabled() else function.forward(None, *arguments)
    return out


def _over_sequences(
    name: str,
    tensors: tuple[Tensor, ...],
    rotation: Rotation | None,
    layout: Layout,
    scale: float,
    rest: tuple[Tensor, ...],
) -> None:
    kernel, shape = _kernel(name), (tensors[0].shape[1], tensors[1].shape[1], tensors[0].shape[2], scale)
    codes = [x.data_ptr() for x in rotation] if rotation else [None, None]

    def part(first: int, last: int) -> None:
        begin, end = np.searchsorted(layout.offsets, (first, last))
        inputs, outputs = ([x.data_ptr() for x in group] for group in (tensors, rest))
        borders = (layout.offsets[begin:].ctypes.data, layout.starts[begin:].ctypes.data, layout.where.ctypes.data)
        kernel(*inputs, *codes, *borders, int(end - begin), *shape, *outputs)

    _in_threads(part, layout.offsets)


def _elementwise(name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    kernel = _kernel(name)

    def part(first: int, last: int) -> None:
        sources, targets = ([x.data_ptr() + 4 * LANES * first for x in group] for group in (inputs, outputs))
        kernel(*sources, LANES * (last - first), *targets)

    _in_threads(part, np.arange(inputs[0].numel() // LANES + 1), inputs[0].numel())


def _kernel(name: str) -> Any:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the kernels are not available on this machine; ask `computes`, `attends` or `scores` first")
    return getattr(loaded, name)


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
