"""The attention kernels against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from pipeline.model.attention import Heads
from pipeline.model.kernels import library, native
from pipeline.rollout import pages
from pipeline.rollout.key_value_cache import SlotCache
from tests.kernel_cases import SETS, angles, assert_close, codes, compiled_for, needs_compiler, normal


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels that are compiled for this one, as on a machine that has no wider one; one after another."""
    yield compiled_for(request.param, monkeypatch)
    library.library.cache_clear()


def properties(examples: int) -> Any:
    return settings(max_examples=examples)


def turned(x: Tensor, angle: Tensor | None) -> Tensor:
    """(n, heads, size) rotated: number d and number d + size / 2 are a complex number."""
    if angle is None:
        return x
    first, second = x.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


# ------------------------------------------------------------------------------------------------- causal attention


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, angle: Tensor | None, lengths: Sequence[int], scale: float
) -> Tensor:
    """Sequence by sequence, head by head, in the precision of its input; differentiable."""
    query, key, heads = turned(query, angle), turned(key, angle), query.shape[1]
    pieces, start = [], 0
    for length in lengths:
        span = slice(start, start := start + length)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = []
        for head in range(heads):
            group = head // (heads // key.shape[1])
            scores = (query[span, head] @ key[span, group].T * scale).masked_fill(hidden, -torch.inf)
            mixed.append(torch.softmax(scores, dim=-1) @ value[span, group])
        pieces.append(torch.stack(mixed, dim=1))
    return torch.cat(pieces)


def check_causal_attention(
    lengths: Sequence[int], heads: int, groups: int, size: int, rotated: bool, spread: float = 1.0, share: float = 1.0
) -> None:
    """Output, and gradients of all three inputs for a random direction, when a share of the tokens asks."""
    total, scale = sum(lengths), size**-0.5
    asking = np.flatnonzero(np.random.default_rng(total).random(total) < share)
    shapes = [(total, heads, size), (total, groups, size), (total, groups, size)]
    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs[0] *= spread
    direction = normal(len(asking), heads, size, seed=9)
    positions = np.concatenate([np.arange(length) for length in lengths])
    layout = native.layout(lengths) if share == 1.0 else native.layout(lengths, asking)

    exact = [x.double().requires_grad_() for x in inputs]
    expected = plain_attention(*exact, angles(positions, size) if rotated else None, lengths, scale)[asking]
    (expected * direction.double()).sum().backward()

    ours = [x.clone().requires_grad_() for x in (inputs[0][asking], *inputs[1:])]
    actual = native.causal_attention(*ours, codes(positions, size) if rotated else None, layout, scale)
    (actual * direction).sum().backward()
    assert_close(actual.detach(), expected.detach(), 2e-5 * spread)
    for mine, theirs in zip([x.grad for x in ours], [exact[0].grad[asking], *(x.grad for x in exact[1:])], strict=True):
        assert_close(mine, theirs, 1e-4 * spread)
    with torch.no_grad():
        alone = native.causal_attention(*ours, codes(positions, size) if rotated else None, layout, scale)
    assert torch.equal(alone, actual)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("size", native.HEAD_SIZES)
def test_causal_attention_of_ragged_sequences(size: int, rotated: bool, share: float) -> None:
    check_causal_attention([17, 1, 200, 15, 33, 16, 1], 4, 2, size, rotated, share=share)


@needs_compiler
@properties(40)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 3), (8, 2)]),
    st.sampled_from(native.HEAD_SIZES[:2]),
    st.booleans(),
    st.sampled_from([1.0, 0.3, 0.0]),
)
def test_causal_attention_of_any_lengths(
    lengths: list[int], heads: tuple[int, int], size: int, rotated: bool, share: float
) -> None:
    check_causal_attention(lengths, *heads, size, rotated, share=share)


@pytest.mark.usefixtures("instruction_set")
def test_causal_attention_that_is_very_sharp() -> None:
    """Scores of some hundreds: a distribution is then mostly one token."""
    check_causal_attention([40, 7], 2, 1, 16, True, spread=100.0)


@needs_compiler
def test_attention_takes_what_is_not_contiguous() -> None:
    """As transformers hands it over: (heads, n, size), transposed."""
    lengths, size = [5, 20], 16
    query, key, value = (normal(heads, 25, size, seed=heads).transpose(0, 1) for heads in (4, 2, 2))
    assert not query.is_contiguous()
    expected = plain_attention(query.double(), key.double(), value.double(), None, lengths, 0.3)
    assert_close(native.causal_attention(query, key, value, None, native.layout(lengths), 0.3), expected)


# ------------------------------------------------------------------------------------------------- cached attention


class PlainCache:
    """What the tokens of every slot and layer were, kept in lists; everything else is computed anew in float64."""

    def __init__(self, layers: int, slots: int) -> None:
        self.held: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(slots)] for _ in range(layers)]

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self.held:
            layer[target] = layer[source][:length]

    def lengths(self) -> list[int]:
        return [len(slot) for slot in self.held[0]]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, slots: np.ndarray, rotated: bool, scale: float
    ) -> Tensor:
        out = torch.empty_like(query, dtype=torch.float64)
        for token, slot in enumerate(slots.tolist()):
            held = self.held[layer][slot]
            angle = angles([len(held)], query.shape[2]) if rotated else None
            held.append((turned(key[token : token + 1].double(), angle)[0], value[token].double()))
            asked = turned(query[token : token + 1].double(), angle)[0]
            for head in range(len(asked)):
                group = head * len(held[0][0]) // len(asked)
                scores = torch.stack([(asked[head] * k[group]).sum() * scale for k, _ in held])
                weights = torch.softmax(scores, dim=0)
                out[token, head] = sum(w * v[group] for w, (_, v) in zip(weights, held, strict=True))
        return out


def check_cache(
    seed: int, heads: int, groups: int, size: int, rotated: bool, dtype: torch.dtype, atol: float, steps: int = 5
) -> SlotCache:
    """Chunks and single tokens of random slots in random order, and copies of slots, compared after every step.

    In the second layer some tokens ask, and all are stored.
    """
    draws, layers, slots, scale = np.random.default_rng(seed), 2, 4, size**-0.5
    config = LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=groups, hidden_size=heads * size, num_hidden_layers=layers
    )
    cache, plain = SlotCache(config, slots, torch.device("cpu"), dtype), PlainCache(layers, slots)
    for step in range(steps):
        for target in range(slots):
            source = int(draws.integers(slots))
            if source != target and plain.lengths()[source] and draws.random() < 0.3:
                length = int(draws.integers(1, plain.lengths()[source] + 1))
                cache.copy(source, target, length)
                plain.copy(source, target, length)
        speaking = draws.permutation(slots)[: draws.integers(1, slots + 1)]
        counts = [int(draws.choice([1, 1, 2, 7, 16, 19])) for _ in speaking]
        starts = [plain.lengths()[slot] for slot in speaking]
        rows = np.repeat(speaking, counts)
        places = np.concatenate([s + np.arange(c) for s, c in zip(starts, counts, strict=True)])
        for slot, start, count in zip(speaking.tolist(), starts, counts, strict=True):
            assert cache.reserve(slot, start, start + count)
        attend = cache.attention(rows, places)
        rotation = tuple(part.to(dtype) for part in codes(places, size)) if rotated else None
        for layer in range(layers):
            numbers = [
                normal(len(rows), h, size, seed=100 * step + 10 * layer + i)
                for i, h in enumerate((heads, groups, groups))
            ]
            expected = plain.attend(layer, *numbers, rows, rotated, scale)
            query, key, value = (x.to(dtype) for x in numbers)
            asking = torch.from_numpy(np.flatnonzero(draws.random(len(rows)) < 0.4)) if layer else None
            chosen = slice(None) if asking is None else asking
            mixed = attend(layer, Heads(query[chosen], key, value, rotation, scale, asking))
            assert_close(mixed, expected[chosen], atol)
    return cache


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("size", native.HEAD_SIZES)
def test_cached_attention(size: int, rotated: bool) -> None:
    cache = check_cache(size, 4, 2, size, rotated, torch.float32, 2e-5)
    assert cache._tiled


@needs_compiler
@properties(10)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 3)]), st.booleans())
def test_cached_attention_of_any_steps(seed: int, heads: tuple[int, int], rotated: bool) -> None:
    check_cache(seed, *heads, 16, rotated, torch.float32, 2e-5, steps=4)


@pytest.mark.parametrize(("size", "dtype"), [(8, torch.float32), (16, torch.float64)])
@pytest.mark.parametrize("rotated", [False, True])
def test_cached_attention_of_other_sizes_and_precisions(size: int, dtype: torch.dtype, rotated: bool) -> None:
    """Through PyTorch; the codes are float32 in any case."""
    for seed in range(3):
        cache = check_cache(seed, 4, 2, size, rotated, dtype, 2e-5)
        assert not cache._tiled


@pytest.mark.usefixtures("instruction_set")
def test_cached_attention_is_causal_attention_bit_for_bit_in_chunks_of_any_size() -> None:
    """The kernel's result for a token does not depend on what passes with it."""
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, num_hidden_layers=1)
    tensors = [normal(50, heads, 16, seed=heads + i) for i, heads in enumerate((4, 2, 2))]
    rotation, results = codes(np.arange(50), 16), []
    for chunk in (50, 16, 7, 1):
        cache, parts = SlotCache(config, 2, torch.device("cpu"), torch.float32), []
        for start in range(0, 50, chunk):
            span = slice(start, start + chunk)
            places = np.arange(50)[span]
            assert cache.reserve(1, int(places[0]), int(places[-1]) + 1)
            attend = cache.attention(np.ones(len(places), dtype=np.int64), places)
            cut = (x[span] for x in tensors)
            parts.append(attend(0, Heads(*cut, tuple(code[span] for code in rotation), 0.25)))
        results.append(torch.cat(parts))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    causal = native.causal_attention(*tensors, rotation, native.layout([50]), 0.25)
    assert_close(results[0], causal)


@pytest.mark.parametrize("size", [8, 16])
def test_a_cache_grows_and_keeps_what_it_holds(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LEAST_GROWTH", 1)
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, hidden_size=2 * size, num_hidden_layers=1)
    cache, plain = SlotCache(config, 2, torch.device("cpu"), torch.float32), PlainCache(1, 2)
    seen: list[list[int]] = []
    for step, count in enumerate([3, 13, 1, 140, 1, 200, 1]):
        rows, places = np.ones(count, dtype=np.int64), len(plain.held[0][1]) + np.arange(count)
        numbers = [normal(count, 2, size, seed=10 * step + i) for i in range(3)]
        expected = plain.attend(0, *numbers, rows, True, 0.2)
        heads = Heads(*numbers, codes(places, size), 0.2)
        assert cache.reserve(1, int(places[0]), int(places[-1]) + 1)
        assert_close(cache.attention(rows, places)(0, heads), expected)
        seen.append([chunk.data_ptr() for chunk in cache.pages.chunks])
    assert len(seen[-1]) >= 3
    assert all(earlier == seen[-1][: len(earlier)] for earlier in seen), "what is held is never moved"
