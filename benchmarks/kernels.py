"""Each kernel against what PyTorch does in its place, by instruction set and shape.

``python -m benchmarks.kernels`` renews the figures behind ``pipeline.model.kernels.native.LONGEST``: microseconds of processor time,
one thread, the least of some repetitions that take turns. PyTorch is held to the same instruction set.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from benchmarks.machine import PRODUCTS
from benchmarks.subjects import SHAPES
from benchmarks.throughput import update
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model import scoring
from pipeline.model.attention import Heads, padded_attention
from pipeline.model.kernels import native
from pipeline.model.kernels.library import CHOICE, library, usable
from pipeline.model.policy import Policy
from pipeline.planning.flops import forward_flops
from pipeline.planning.processor import processor
from pipeline.rollout.key_value_cache import SlotCache

CAPABILITY = {"avx512": "avx512", "avx2": "avx2", "baseline": "default", "neon": "default"}
"""What PyTorch calls them."""
CPU = torch.device("cpu")
LENGTHS = (40, 160, 640, 1024, 2048, 4096)


class Pair(NamedTuple):
    """A kernel's work, once by the kernel and once by PyTorch."""

    name: str
    shape: str
    kernel: Callable[[], Any]
    pytorch: Callable[[], Any]


def attention(size: int, length: int, gradients: bool, tokens: int = 4096, heads: int = 4) -> Pair:
    """Over whole sequences of equal lengths, which PyTorch's padding suits best."""
    count = max(1, tokens // length)
    query, key, value, slope = torch.randn(4, count * length, heads, size).unbind()
    angle = torch.randn(count * length, size)
    inputs = [x.contiguous().requires_grad_(gradients) for x in (query, key, value)]
    heads_of = Heads(inputs[0], inputs[1], inputs[2], (angle.cos(), angle.sin()), size**-0.5)

    def step(attend: Callable[[int, Heads], Tensor]) -> Callable[[], Any]:
        if gradients:
            return lambda: torch.autograd.grad(attend(0, heads_of), inputs, slope)
        return lambda: attend(0, heads_of)

    layout = native.layout([length] * count)
    return Pair(
        "attention, gradients" if gradients else "attention",
        f"head {size}, length {length}",
        step(lambda layer, x: native.causal_attention(*x[:4], layout, x.scale)),
        step(padded_attention(np.full(count, length), CPU)),
    )


def cached(size: int, length: int, new: int, slots: int, heads: int = 4) -> Pair:
    """The last ``new`` tokens of every slot: one, as in sampling, or all, as of a prompt."""
    config = LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * size, num_hidden_layers=1
    )
    places, rows = np.tile(np.arange(length - new, length), slots), np.repeat(np.arange(slots), new)
    angle = torch.randn(len(rows), size)
    query, key, value = torch.randn(3, len(rows), heads, size).unbind()
    asked = Heads(query, key, value, (angle.cos(), angle.sin()), size**-0.5)

    def step(tiled: bool) -> Callable[[], Any]:
        cache = SlotCache(config, slots, CPU, torch.float32)
        cache._tiled = tiled
        for slot in range(slots):
            cache.reserve(slot, 0, length)
        return lambda: cache.attention(rows, places)(0, asked)

    name = "attention, one token" if new == 1 else "attention, prompt"
    return Pair(name, f"head {size}, length {length}", step(True), step(False))


def rms_norm(width: int, rows: int, gradients: bool) -> Pair:
    x, weight = torch.randn(rows, width, requires_grad=gradients), torch.randn(width, requires_grad=gradients)
    slope = torch.randn(rows, width)

    def step(function: Callable[[], Tensor]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(function(), (x, weight), slope)) if gradients else function

    ours, theirs = (lambda: native.rms_norm(x, weight, 1e-6)), (lambda: F.rms_norm(x, (width,), weight, 1e-6))
    return Pair(f"rms_norm{', gradients' * gradients}", f"{rows} x {width}", step(ours), step(theirs))


def swiglu(width: int, rows: int, gradients: bool) -> Pair:
    gate, up = (torch.randn(rows, width, requires_grad=gradients) for _ in range(2))
    slope = torch.randn(rows, width)

    def step(function: Callable[[], Tensor]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(function(), (gate, up), slope)) if gradients else function

    return Pair(
        f"swiglu{', gradients' * gradients}",
        f"{rows} x {width}",
        step(lambda: native.swiglu(gate, up)),
        step(lambda: F.silu(gate) * up),
    )


def score(vocabulary: int, rows: int) -> Pair:
    """Forward and backward, without the products; both overwrite logits, so both are given a copy."""
    logits, tokens = torch.randn(rows, vocabulary) * 3, torch.arange(rows) % vocabulary
    slopes = tuple(torch.randn(3, rows))

    def step(forward: Any, backward: Any) -> Callable[[], Any]:
        def both() -> Tensor:
            raw, normaliser, _, entropy = forward(logits.clone(), tokens, 1.0)
            slope: Tensor = backward(logits.clone(), tokens, 1.0, raw, normaliser, entropy, slopes)
            return slope

        return both

    ours, theirs = (native.score, native.score_slope), (scoring._score, scoring._score_slope)
    return Pair("score", f"{rows} x {vocabulary}", step(*ours), step(*theirs))


def sample(vocabulary: int, rows: int) -> Pair:
    from pipeline.rollout.transformers_engine import sample_by_torch

    logits, draws = torch.randn(rows, vocabulary) * 3, torch.rand(rows, dtype=torch.float64)
    ours, theirs = (lambda: native.sample(logits, 1.0, draws)), (lambda: sample_by_torch(logits, 1.0, draws))
    return Pair("sample", f"{rows} x {vocabulary}", ours, theirs)


def pairs(
    lengths: Sequence[int] = LENGTHS,
    sizes: Sequence[int] = native.HEAD_SIZES,
    widths: Sequence[int] = (64, 256, 1024, 4096),
    vocabularies: Sequence[int] = (420, 5000, 32000, 150000),
) -> Iterator[Pair]:
    """Every kernel at every shape."""
    for size in sizes:
        for length in lengths:
            for gradients in (True, False):
                yield attention(size, length, gradients)
            if length <= 2048:
                yield cached(size, length, 1, 64)
                yield cached(size, length, length, max(1, 2048 // length))
    for width in widths:
        for gradients in (True, False):
            yield rms_norm(width, 2**18 // width, gradients)
            yield swiglu(width, 2**18 // width, gradients)
    for vocabulary in vocabularies:
        yield score(vocabulary, 2**19 // vocabulary)
        yield sample(vocabulary, 2**19 // vocabulary)


def least(works: list[Callable[[], Any]], seconds: float = 0.15, rounds: int = 3) -> list[float]:
    """Microseconds of processor time of each, the least of at least three and at most as many as fit."""
    best = [float("inf")] * len(works)
    for work in works:
        work()
    began, done = time.process_time(), 0
    while done < rounds or time.process_time() - began < seconds:
        for number, work in enumerate(works):
            start = time.process_time()
            work()
            best[number] = min(best[number], (time.process_time() - start) * 1e6)
        done += 1
    return best


def update_of(shape: tuple[int, int, int]) -> tuple[float, float]:
    """Tokens per second of an update with all kernels in it, and its share of the float32 matrix peak.

    A random policy of this hidden size, layers and heads reads 64 sequences as long as the default's episodes.
    """
    hidden, layers, heads = shape
    tokenizer = train_tokenizer(["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down"] * 3, 320)
    config = Qwen2Config(
        vocab_size=420,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    policy, draws = Policy(Qwen2ForCausalLM(config).train(), tokenizer), np.random.default_rng(0)
    ids = [draws.integers(0, 420, n).astype(np.int32) for n in draws.integers(100, 260, 64)]
    wanted = [np.arange(len(i)) % 40 >= 18 for i in ids]
    products = {(m, k, n): (torch.randn(m, k), torch.randn(k, n)) for m, k, n in PRODUCTS}
    works = [lambda a=a, b=b: a @ b for a, b in products.values()]
    spent, *others = least([lambda: update(policy, ids, wanted, 4096), *works], 3.0)
    peak = max(2.0 * m * k * n / time for (m, k, n), time in zip(products, others, strict=True))
    lengths = [len(i) for i in ids]
    return sum(lengths) / spent * 1e6, 3 * forward_flops(policy.model.config, lengths, wanted) / spent / peak


def measure(only: str) -> None:
    """Print a line for each kernel and shape, and for updates of two sizes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaded = library()
    assert loaded is not None
    name = loaded.instruction_set
    for pair in pairs():
        if not pair.name.startswith(only):
            continue
        ours, theirs = least([pair.kernel, pair.pytorch])
        ratio = theirs / ours
        print(f"{name:<8}  {pair.name:<20}  {pair.shape:<22}  {ours:>9,.0f}  {theirs:>9,.0f}  {ratio:.2f}", flush=True)
    for size in ("0.2 M", "1.1 M"):
        if "update".startswith(only):
            speed, share = update_of(SHAPES[size])
            print(
                f"{name:<8}  update, {size} parameters: {speed:,.0f} tokens/s, {share:.0%} of the matrix peak",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", help="comma-separated instruction sets; all that the machine has by default")
    parser.add_argument("--only", default="", help="what begins so: attention, rms_norm, swiglu, score, sample, update")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        measure(arguments.only)
        return
    print(processor())
    print("set       kernel                shape                     kernel    pytorch  pytorch over kernel, µs")
    for name in arguments.isa.split(",") if arguments.isa else usable():
        capability = {"ATEN_CPU_CAPABILITY": CAPABILITY[name], CHOICE: name}
        command = [sys.executable, "-m", "benchmarks.kernels", "--here", "--only", arguments.only]
        subprocess.run(command, env=os.environ | capability, check=True)


if __name__ == "__main__":
    main()
