"""Attention with windows and soft caps against its definition, one query at a time in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.model.attention import Heads, packed_attention

LENGTHS = (5, 1, 12, 7)
CPU = torch.device("cpu")


def random_heads(size: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [3 * torch.randn(sum(LENGTHS), count, size, generator=draws) for count in (4, 2, 2)]


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """Queries, keys and values of all tokens, (n, heads, size)."""
    rows, start = [], 0
    for length in LENGTHS:
        for t in range(start, start + length):
            first = start if window is None else max(start, t + 1 - window)
            heads = []
            for h in range(query.shape[1]):
                g = h * key.shape[1] // query.shape[1]
                scores = key[first : t + 1, g] @ query[t, h] * scale
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                heads.append(torch.exp(scores - scores.logsumexp(0)) @ value[first : t + 1, g])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize("asking", [None, [0, 3, 5, 6, 17, 24]])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 12, 100])
@pytest.mark.parametrize("size", [8, 16])
def test_windows_and_caps_are_what_they_say(
    size: int, window: int | None, cap: float | None, asking: list[int] | None
) -> None:
    """Values and gradients; heads of 16 have a kernel, which knows neither."""
    tensors = [x.requires_grad_() for x in random_heads(size)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    rows = None if asking is None else torch.tensor(asking)
    query, key, value = tensors
    asked = query if rows is None else query[rows]
    mixed = packed_attention(LENGTHS, CPU)(0, Heads(asked, key, value, None, 0.3, rows, window, cap))
    expected = by_definition(*exact, 0.3, window, cap)
    expected = expected if rows is None else expected[rows]
    slope = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    ours = [mixed, *torch.autograd.grad(mixed, tensors, slope)]
    theirs = [expected, *torch.autograd.grad(expected, exact, slope.double())]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=2e-5)


def test_half_precision_stays_so() -> None:
    query, key, value = (x.bfloat16() for x in random_heads(16))
    mixed = packed_attention(LENGTHS, CPU)(0, Heads(query, key, value, None, 0.3, window=3, cap=2.0))
    assert mixed.dtype == torch.bfloat16
    expected = by_definition(query.double(), key.double(), value.double(), 0.3, 3, 2.0)
    torch.testing.assert_close(mixed.double(), expected, atol=0.1, rtol=0.05)
