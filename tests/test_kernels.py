"""The native kernels against plain arithmetic in float64, and the pipeline without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.model.kernels import library, native
from tests.kernel_cases import SETS, WORK, assert_close, compiled_for, gradients, needs_compiler, normal, plain_swiglu


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels that are compiled for this one, as on a machine that has no wider one; one after another."""
    yield compiled_for(request.param, monkeypatch)
    library.library.cache_clear()


# ---------------------------------------------------------------------------------------------- token-wise kernels


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


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", WORK)
def test_threads_change_nothing(name: str, threads: Callable[[int], None]) -> None:
    threads(1)
    alone = WORK[name]()
    for count in (2, 3):
        threads(count)
        for ours, theirs in zip(WORK[name](), alone, strict=True):
            assert torch.equal(ours, theirs)
