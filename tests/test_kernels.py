"""The native kernels against plain arithmetic in float64, and the pipeline without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.energy.annotate import score_trajectories
from pipeline.model.kernels import library, native
from pipeline.model.policy import Policy
from pipeline.model.trunk import Heads, packed_attention
from pipeline.rollout.collector import collect
from pipeline.rollout.key_value_cache import SlotCache
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import parse
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
HAS_COMPILER = shutil.which(os.environ.get("CC", "cc")) is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
SETS = library.usable()
"""Instruction sets of this machine, the widest first."""
Rotation = tuple[Tensor, Tensor]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels that are compiled for this one, as on a machine that has no wider one; one after another."""
    yield compiled_for(request.param, monkeypatch)
    library.library.cache_clear()


def compiled_for(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ACTFOCUS_KERNELS", name)
    library.library.cache_clear()
    loaded = library.library()
    assert loaded is not None
    assert loaded.instruction_set == name
    return name


def properties(examples: int) -> Any:
    return settings(max_examples=examples)


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


def turned(x: Tensor, angle: Tensor | None) -> Tensor:
    """(n, heads, size) rotated: number d and number d + size / 2 are a complex number."""
    if angle is None:
        return x
    first, second = x.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


def assert_close(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray, atol: float = 1e-5) -> None:
    pair = (torch.as_tensor(actual).double(), torch.as_tensor(expected).double())
    torch.testing.assert_close(*pair, atol=atol, rtol=1e-4, equal_nan=False)


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
    assert cache.keys.shape[-1] == native.LANES


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
        assert cache.keys.shape == cache.values.shape


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
            attend = cache.attention(np.ones(len(places), dtype=np.int64), places)
            cut = (x[span] for x in tensors)
            parts.append(attend(0, Heads(*cut, tuple(code[span] for code in rotation), 0.25)))
        results.append(torch.cat(parts))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    causal = native.causal_attention(*tensors, rotation, native.layout([50]), 0.25)
    assert_close(results[0], causal)


@pytest.mark.parametrize("size", [8, 16])
def test_a_cache_grows_and_keeps_what_it_holds(size: int) -> None:
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, hidden_size=2 * size, num_hidden_layers=1)
    cache, plain = SlotCache(config, 2, torch.device("cpu"), torch.float32), PlainCache(1, 2)
    seen = set()
    for step, count in enumerate([3, 13, 1, 140, 1, 200, 1]):
        rows, places = np.ones(count, dtype=np.int64), len(plain.held[0][1]) + np.arange(count)
        numbers = [normal(count, 2, size, seed=10 * step + i) for i in range(3)]
        expected = plain.attend(0, *numbers, rows, True, 0.2)
        heads = Heads(*numbers, codes(places, size), 0.2)
        assert_close(cache.attention(rows, places)(0, heads), expected)
        assert cache.capacity >= places[-1] + 1
        seen.add(cache.capacity)
    assert len(seen) >= 3


# ---------------------------------------------------------------------------------------------- token-wise kernels


def gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 5) -> list[Tensor]:
    """The result, and the gradients of the inputs for a random direction."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = function(*inputs)
    out.backward(normal(*out.shape, seed=seed).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]  # type: ignore[misc]


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) ** 0.5


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (5, 160), (3, 1024), (6, 4, 32), (2, 3, 5, 16)])
def test_rms_norm(shape: tuple[int, ...], spread: float) -> None:
    x, weight = normal(*shape, seed=0, scale=spread), normal(shape[-1], seed=1)
    x.view(-1, shape[-1])[0] = 0.0 if spread == 1.0 else spread
    actual = gradients(lambda *xs: native.rms_norm(*xs, 1e-6), x, weight)
    expected = gradients(plain_rms_norm, x.double(), weight.double())
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, 1e-5 * max(1.0, float(theirs.abs().max())))


@needs_compiler
def test_rms_norm_of_what_is_not_contiguous() -> None:
    x, weight = normal(16, 9, seed=0).T, normal(16, seed=1)
    actual = gradients(lambda *xs: native.rms_norm(*xs, 1e-6), x, weight)
    for ours, theirs in zip(actual, gradients(plain_rms_norm, x.double(), weight.double()), strict=True):
        assert_close(ours, theirs)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * up / (1 + torch.exp(-gate))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (9, 48), (4, 176), (33, 1024)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_swiglu(rows: int, width: int, spread: float) -> None:
    inputs = [normal(rows, width, seed=seed, scale=spread) for seed in (0, 1)]
    actual = gradients(native.swiglu, *inputs)
    for ours, theirs in zip(actual, gradients(plain_swiglu, *(x.double() for x in inputs)), strict=True):
        assert_close(ours, theirs, 1e-5 * spread)


@pytest.mark.usefixtures("instruction_set")
def test_swiglu_at_its_ends() -> None:
    ends = [-1e4, -100.0, -88.0, -87.0, -20.0, -1e-7, -0.0, 0.0, 1e-7, 20.0, 87.0, 88.0, 100.0, 1e4, -5.0, 5.0]
    actual = gradients(native.swiglu, torch.tensor([ends]), torch.full((1, 16), -100.0))
    exact = gradients(plain_swiglu, torch.tensor([ends]).double().clamp_min(-700), torch.full((1, 16), -100.0).double())
    for ours, theirs in zip(actual, exact, strict=True):
        assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------- scores and samples


def plain_scores(logits: Tensor, tokens: Tensor, temperature: float) -> list[Tensor]:
    """Raw and tempered log-partition, log-probability, entropy; differentiable."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logprobs[torch.arange(len(tokens)), tokens]
    raw, tempered = (torch.log(torch.exp(x - x.max()).sum(-1)) + x.max() for x in (logits, logits / temperature))
    return [raw, tempered, chosen, -(logprobs.exp() * logprobs).sum(-1)]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "spread"),
    [(1, 1, 1.0), (6, 15, 5.0), (6, 16, 5.0), (6, 17, 5.0), (3, 420, 30.0), (2, 5000, 3.0)],
)
def test_scores_and_their_slopes(rows: int, vocabulary: int, spread: float, temperature: float) -> None:
    logits = normal(rows, vocabulary, seed=0, scale=spread)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(vocabulary, size=rows))
    exact = logits.double().requires_grad_()
    expected = plain_scores(exact, tokens, temperature)
    columns = native.score(logits.clone(), tokens, temperature)
    for ours, theirs in zip(columns, expected, strict=True):
        assert_close(ours, theirs.detach(), 1e-5 * spread)
    slopes = [normal(rows, seed=seed) for seed in (1, 2, 3)]
    raw, normaliser, logprob, entropy = expected
    sum((s.double() * x).sum() for s, x in zip(slopes, (logprob, entropy, raw), strict=True)).backward()
    raw, normaliser, _, entropy = columns
    slope = native.score_slope(logits.clone(), tokens, temperature, raw, normaliser, entropy, tuple(slopes))
    assert_close(slope, exact.grad, 1e-5 * spread)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "spread"),
    [(50, 1, 1.0), (300, 15, 2.0), (300, 16, 2.0), (300, 17, 2.0), (300, 420, 4.0), (10, 150_000, 2.0)],
)
def test_samples_invert_the_cumulative_distribution(
    rows: int, vocabulary: int, spread: float, temperature: float
) -> None:
    logits, draws = normal(rows, vocabulary, seed=0, scale=spread), np.random.default_rng(1).random(rows)
    draws[:2] = 0.0, 1 - 2**-53
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1).numpy()
    borders = np.exp(logprobs).cumsum(-1)
    token, logprob, entropy = native.sample(logits, temperature, torch.from_numpy(draws))
    chosen = token.numpy()
    below = np.where(chosen > 0, np.take_along_axis(borders, (chosen - 1).clip(0)[:, None], 1)[:, 0], 0.0)
    above = np.take_along_axis(borders, chosen[:, None], 1)[:, 0]
    assert (below <= draws + 1e-6).all()
    assert (draws <= above + 1e-6).all()
    assert_close(logprob, np.take_along_axis(logprobs, chosen[:, None], 1)[:, 0], 2e-5)
    assert_close(entropy, -(np.exp(logprobs) * logprobs).sum(-1), 2e-5)


# --------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def causal(lengths: Sequence[int]) -> list[Tensor]:
    tensors = [normal(sum(lengths), heads, 16, seed=heads + i) for i, heads in enumerate((4, 2, 2))]
    rotation, layout = codes(np.arange(sum(lengths)), 16), native.layout(lengths)
    return gradients(lambda *qkv: native.causal_attention(*qkv, rotation, layout, 0.25), *tensors)


def cached(counts: Sequence[int]) -> list[Tensor]:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, num_hidden_layers=1)
    cache = SlotCache(config, len(counts), torch.device("cpu"), torch.float32)
    places = np.concatenate([np.arange(count) for count in counts])
    attend = cache.attention(np.repeat(np.arange(len(counts)), counts), places)
    tensors = [normal(sum(counts), heads, 16, seed=heads + i) for i, heads in enumerate((4, 2, 2))]
    return [attend(0, Heads(*tensors, codes(places, 16), 0.25)), cache.keys, cache.values]


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


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", WORK)
def test_threads_change_nothing(name: str, threads: Callable[[int], None]) -> None:
    threads(1)
    alone = WORK[name]()
    for count in (2, 3):
        threads(count)
        for ours, theirs in zip(WORK[name](), alone, strict=True):
            assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------------ instruction sets


def odd_rows(width: int) -> Sequence[Tensor]:
    inputs = [normal(37, width, seed=seed, scale=5.0) for seed in (0, 1)]
    normed = gradients(lambda *xs: native.rms_norm(*xs, 1e-6), inputs[0], normal(width, seed=2))
    return [*normed, *gradients(native.swiglu, *inputs)]


def odd_logits(vocabulary: int) -> Sequence[Tensor]:
    logits, tokens = normal(7, vocabulary, seed=0, scale=3.0), torch.arange(7) % vocabulary
    columns = native.score(logits.clone(), tokens, 0.7)
    raw, normaliser, _, entropy = columns
    slopes = tuple(normal(3, 7, seed=1))
    slope = native.score_slope(logits.clone(), tokens, 0.7, raw, normaliser, entropy, slopes)
    return [*columns, slope, *native.sample(logits, 0.7, torch.linspace(0, 0.99, 7, dtype=torch.float64))]


def odd_heads(size: int) -> Sequence[Tensor]:
    lengths = [17, 1, 131, 15, 33]
    tensors = [normal(sum(lengths), heads, size, seed=heads + i) for i, heads in enumerate((6, 3, 3))]
    rotation, layout = codes(np.concatenate([np.arange(n) for n in lengths]), size), native.layout(lengths)
    return gradients(lambda *qkv: native.causal_attention(*qkv, rotation, layout, size**-0.5), *tensors)


ODD: dict[str, Callable[[], Sequence[Tensor]]] = {
    **{f"causal, heads of {size}": partial(odd_heads, size) for size in native.HEAD_SIZES},
    "cached": WORK["cached, one long"],
    **{f"rows of {width}": partial(odd_rows, width) for width in (16, 48, 1040)},
    **{f"vocabulary of {count}": partial(odd_logits, count) for count in (1, 15, 17, 421, 3001)},
}


@needs_compiler
@pytest.mark.parametrize("name", ODD)
def test_kernels_say_the_same_for_every_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both have fused multiply-add to the bit: the order of sums does not depend on the length of a vector."""
    found = {}
    for which in SETS:
        compiled_for(which, monkeypatch)
        found[which] = ODD[name]()
    library.library.cache_clear()
    for which, results in found.items():
        for ours, theirs in zip(results, found[SETS[0]], strict=True):
            assert_close(ours, theirs, 2e-5)
            if {which, SETS[0]} == {"avx2", "avx512"}:
                assert torch.equal(ours, theirs)


class Seen(TorchDispatchMode):
    """Names of the operations that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [64, 128])
def test_attention_is_left_to_pytorch_where_pytorch_is_faster(instruction_set: str, size: int) -> None:
    """In long sequences of wide heads; not for a short sequence beside them, which would be padded."""
    longest = native.LONGEST[instruction_set][size]
    for lengths, pytorch in (([longest + 1], True), ([longest], False), ([longest + 1, 3], False)):
        tensors = [normal(sum(lengths), 1, size, seed=seed) for seed in range(3)]
        with Seen() as seen, torch.no_grad():
            mixed = packed_attention(lengths, torch.device("cpu"))(0, Heads(*tensors, None, size**-0.5))
        assert any("scaled_dot_product" in name for name in seen.names) == pytorch
        alone = native.causal_attention(*tensors, None, native.layout(lengths), size**-0.5)
        assert_close(mixed, alone, 2e-5)
        assert torch.equal(mixed, alone) != pytorch


def test_every_instruction_set_has_a_longest_sequence_for_every_head_size() -> None:
    assert set(native.LONGEST) == set(library.INSTRUCTION_SETS)
    assert all(tuple(sizes) == native.HEAD_SIZES for sizes in native.LONGEST.values())


@pytest.mark.parametrize("choice", ["AVX2", "avx1024", "neon" if "neon" not in SETS else "avx512"])
def test_an_instruction_set_that_is_none_or_not_there_is_refused(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTFOCUS_KERNELS", choice)
    library.library.cache_clear()
    with pytest.raises(UserError) as refused:
        library.library()
    (line,) = str(refused.value).splitlines()
    allowed = ", ".join(["off", *SETS])
    assert line == f"ACTFOCUS_KERNELS: {choice!r} is not an instruction set of this machine; allowed: {allowed}"


# -------------------------------------------------------------------------------------------------- where none are


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the source that was never compiled, in a folder of its own; the user's cache is elsewhere."""
    source = tmp_path / "kernels" / "kernels.c"
    source.parent.mkdir()
    shutil.copy(library.SOURCE, source)
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield source.parent
    library.library.cache_clear()


@needs_compiler
def test_what_was_compiled_is_found_again(fresh_library: Path) -> None:
    assert library.library() is not None
    (compiled,) = fresh_library.rglob("*.so")
    before = compiled.stat()
    library.library.cache_clear()
    assert library.library() is not None
    assert list(fresh_library.rglob("*.so")) == [compiled]
    assert (compiled.stat().st_mtime_ns, compiled.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    (fresh_library / "kernels.c").write_text((fresh_library / "kernels.c").read_text() + "/* another */\n")
    library.library.cache_clear()
    assert library.library() is not None
    assert len(list(fresh_library.rglob("*.so"))) == 2


@needs_compiler
def test_it_is_compiled_elsewhere_when_its_own_folder_cannot_be_written(fresh_library: Path, tmp_path: Path) -> None:
    (fresh_library / "__pycache__").write_text("no folder")
    assert library.library() is not None
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


def lesser_machine(folder: Path, without: str) -> str:
    """A compiler that works as the machine's does, but does not define macros with this in their names."""
    path = folder / f"cc-without-{without}"
    path.write_text(f'#!/bin/sh\ncase "$*" in\n*-dM*) cc "$@" | grep -v {without} ;;\n*) exec cc "$@" ;;\nesac\n')
    path.chmod(0o700)
    return str(path)


@needs_compiler
@pytest.mark.skipif("avx2" not in SETS, reason="no AVX2 here that could be missing")
def test_machines_that_share_a_cache_do_not_load_what_another_has_compiled(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert library.library() is not None
    for number, (without, expected) in enumerate([("SSE4_2", SETS[0]), ("AVX512", "avx2")], 2):
        monkeypatch.setenv("CC", lesser_machine(tmp_path, without))
        library.library.cache_clear()
        loaded = library.library()
        assert loaded is not None
        assert loaded.instruction_set == expected
        assert len(list(fresh_library.rglob("*.so"))) == number
        last = torch.tensor([[1.0] * 16])
        assert_close(native.swiglu(last, last), plain_swiglu(last, last))


def test_what_does_not_compile_is_not_used(fresh_library: Path) -> None:
    (fresh_library / "kernels.c").write_text("this is no C")
    assert library.library() is None


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_without_a_working_compiler_there_are_no_kernels(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert library.library() is None
    assert not native.attends(torch.empty(1, 16))
    assert not native.computes(torch.empty(1, 16))


def rollout_and_scores(path: str) -> None:
    """Played and scored episodes of a random policy with heads of 16 numbers, as an .npz; also run on its own, below."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["player 0 1 goal 3 3 holes none", "let me think", "Left Right Up Down"] * 3, 320)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            **shape,
        )
    )
    policy = Policy(model.eval(), tokenizer)
    raw = read_yaml(ROOT / "params.yaml")
    raw["rollout"] = {"groups": 2, "group_size": 4, "batch_episodes": 3}
    raw["train"]["minibatch"] = 4
    config = parse(raw)
    name = next(iter(config.environments))
    played = collect(TransformersEngine(policy, 3), tokenizer, config, name, iteration_specs(config, name, 0, 0), 0.9)
    logprob, entropy, partition = score_trajectories(policy, played, 0.9, 500)
    columns = {"sampled": played.sampled, "recorded": played.logprob, "recorded_entropy": played.entropy}
    scored = {"logprob": logprob, "entropy": entropy, "partition": partition}
    np.savez(
        path, ids=played.input_ids, offsets=played.offsets, kernels=library.library() is not None, **columns, **scored
    )


def test_the_pipeline_says_the_same_without_kernels(tmp_path: Path) -> None:
    rollout_and_scores(str(tmp_path / "with.npz"))
    for name, variables in (("off", {"ACTFOCUS_KERNELS": "off"}), ("broken", {"CC": "false"})):
        code = f"import test_kernels; test_kernels.rollout_and_scores({str(tmp_path / name)!r} + '.npz')"
        environment = {**os.environ, **variables, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    own = np.load(tmp_path / "with.npz")
    assert own["kernels"] == HAS_COMPILER
    assert own["sampled"].sum() > 500
    np.testing.assert_allclose(own["logprob"][own["sampled"]], own["recorded"][own["sampled"]], atol=1e-4)
    for name in ("off", "broken"):
        plain = np.load(tmp_path / f"{name}.npz")
        assert not plain["kernels"]
        for column in ("ids", "offsets", "sampled"):
            np.testing.assert_array_equal(plain[column], own[column])
        for column in ("recorded", "recorded_entropy", "logprob", "entropy", "partition"):
            np.testing.assert_allclose(plain[column], own[column], atol=1e-4)
