"""Tensors and instruction sets for tests of the kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from pipeline.model.attention import Heads
from pipeline.model.kernels import library, native
from pipeline.rollout.key_value_cache import SlotCache

HAS_COMPILER = shutil.which(os.environ.get("CC", "cc")) is not None


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")


SETS = library.usable()
"""Instruction sets of this machine, the widest first."""


Rotation = tuple[Tensor, Tensor]


def compiled_for(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ACTFOCUS_KERNELS", name)
    library.library.cache_clear()
    loaded = library.library()
    assert loaded is not None
    assert loaded.instruction_set == name
    return name


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def angles(positions: Sequence[int] | np.ndarray, size: int) -> Tensor:
    """Of rotary position codes, (n, size / 2) in float64."""
    speed = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.as_tensor(np.asarray(positions), dtype=torch.float64)[:, None] * speed


def codes(positions: Sequence[int] | np.ndarray, size: int) -> Rotation:
    """The same as transformers hands it over: cosines and sines, each twice."""
    angle = torch.cat([angles(positions, size)] * 2, dim=1)
    return angle.cos().float(), angle.sin().float()


def assert_close(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray, atol: float = 1e-5) -> None:
    pair = (torch.as_tensor(actual).double(), torch.as_tensor(expected).double())
    torch.testing.assert_close(*pair, atol=atol, rtol=1e-4, equal_nan=False)


def gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 5) -> list[Tensor]:
    """The result, and the gradients of the inputs for a random direction."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = function(*inputs)
    out.backward(normal(*out.shape, seed=seed).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]  # type: ignore[misc]


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * up / (1 + torch.exp(-gate))


def causal(lengths: Sequence[int]) -> list[Tensor]:
    tensors = [normal(sum(lengths), heads, 16, seed=heads + i) for i, heads in enumerate((4, 2, 2))]
    rotation, layout = codes(np.arange(sum(lengths)), 16), native.layout(lengths)
    return gradients(lambda *qkv: native.causal_attention(*qkv, rotation, layout, 0.25), *tensors)


def cached(counts: Sequence[int]) -> list[Tensor]:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, num_hidden_layers=1)
    cache = SlotCache(config, len(counts), torch.device("cpu"), torch.float32)
    places = np.concatenate([np.arange(count) for count in counts])
    for slot, count in enumerate(counts):
        assert cache.reserve(slot, 0, count)
    attend = cache.attention(np.repeat(np.arange(len(counts)), counts), places)
    tensors = [normal(sum(counts), heads, 16, seed=heads + i) for i, heads in enumerate((4, 2, 2))]
    return [attend(0, Heads(*tensors, codes(places, 16), 0.25)), cache.pages.chunks[0][:, : cache.pages.used]]


WORK: dict[str, Callable[[], Sequence[Tensor]]] = {
    "causal, even": lambda: causal([20, 20, 20, 20, 20, 20]),
    "causal, one long": lambda: causal([3, 90, 2, 1]),
    "causal, the last long": lambda: causal([1, 2, 3, 90]),
    "causal, alone": lambda: causal([50]),
    "cached, singles": lambda: cached([1] * 9),
    "cached, one long": lambda: cached([2, 90, 3, 1]),
    "cached, the first long": lambda: cached([90, 2, 1, 1]),
    "cached, the last long": lambda: cached([2, 1, 1, 90]),
    "cached, alone": lambda: cached([50]),
    "rms_norm": lambda: gradients(lambda *xs: native.rms_norm(*xs, 1e-6), normal(41, 32, seed=0), normal(32, seed=1)),
    "swiglu": lambda: gradients(native.swiglu, normal(41, 32, seed=0), normal(41, 32, seed=1)),
    "score": lambda: native.score(normal(9, 33, seed=0), torch.arange(9), 0.7),
    "score_slope": lambda: [
        native.score_slope(
            normal(9, 33, seed=0), torch.arange(9), 0.7, *normal(3, 9, seed=1), tuple(normal(3, 9, seed=2))
        )
    ],
    "sample": lambda: native.sample(normal(9, 33, seed=0), 0.7, torch.linspace(0, 0.99, 9, dtype=torch.float64)),
}
