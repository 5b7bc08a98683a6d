"""Floating-point operations that cannot be avoided, by rules.

* A matrix product of (m, k) and (k, n) is 2 m k n.
* Attention is causal: a token attends to itself and what is before it, so a sequence of T tokens has T (T + 1) / 2 pairs;
  a pair costs 2 x head size for the score and as much for the mixture, per head.
* What nobody reads is not counted: behind the last layer's keys and values only the tokens whose state is asked for, and
  the output head only for those.
* A backward pass is two forward passes. Normalisation, activation, softmax, embedding, sampling and the optimiser are
  not counted: they are what a good program hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Reading(NamedTuple):
    """What a forward pass over whole sequences computes."""

    tokens: float
    pairs: float
    """Of a token and one that it attends to, in a layer that computes every token."""
    wanted: float
    """Tokens that are to be predicted."""
    wanted_pairs: float
    """Those pairs of the tokens that predict them."""


def forward_flops(config: Any, lengths: Sequence[int] | np.ndarray, wanted: Sequence[np.ndarray]) -> float:
    """One forward pass over whole sequences.

    Args:
        config: the transformers configuration of a Qwen2 or Llama shape.
        lengths: tokens of each sequence.
        wanted: for each sequence a bool mask of the tokens to be predicted.
    """
    pairs = float(sum(length * (length + 1) / 2 for length in lengths))
    wanted_pairs = float(sum(np.flatnonzero(mask).sum() for mask in wanted))  # token t is predicted from t others
    rows = float(sum(mask.sum() for mask in wanted))
    return reading_flops(config, Reading(float(np.sum(lengths)), pairs, rows, wanted_pairs))


def reading_flops(config: Any, read: Reading) -> float:
    """One forward pass, by what it computes; ``config`` is as in ``forward_flops``."""
    heads, groups, size = head_shape(config)
    query_side = 2 * heads * size * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    key_side = 2 * groups * size * config.hidden_size
    before, per_pair = config.num_hidden_layers - 1, 4 * heads * size
    linear = before * read.tokens * (query_side + key_side) + read.tokens * key_side + read.wanted * query_side
    attention = per_pair * (before * read.pairs + read.wanted_pairs)
    return float(2 * linear + attention + head_flops(config, read.wanted))


def head_flops(config: Any, rows: float) -> float:
    """Logits of so many tokens."""
    return float(2 * rows * config.hidden_size * config.vocab_size)


def sampling_flops(config: Any, prompts: Sequence[int], lengths: Sequence[int], sampled: int) -> float:
    """Sampling episodes whose prompts are computed once a group.

    Args:
        config: see ``forward_flops``.
        prompts: tokens of each distinct prompt.
        lengths: tokens of each episode, its prompt's first ones among them; as many episodes for each prompt.
        sampled: how many of the tokens were sampled; each needs one row of logits.
    """
    share = len(lengths) // len(prompts)
    own = sum(lengths) - share * sum(prompts)
    pairs = sum(n * (n + 1) / 2 for n in lengths) - (share - 1) * sum(n * (n + 1) / 2 for n in prompts)
    return cached_flops(config, own + sum(prompts), pairs, sampled)


def cached_flops(config: Any, tokens: float, pairs: float, rows: float) -> float:
    """New tokens that pass through all of every layer, for the cache has all of them; logits of ``rows`` of them."""
    heads, groups, size = head_shape(config)
    per_token = config.hidden_size * (2 * (heads + groups) * size + 3 * config.intermediate_size)
    linear = config.num_hidden_layers * tokens * per_token
    attention = 4 * heads * size * config.num_hidden_layers * pairs
    return float(2 * linear + attention + head_flops(config, rows))


def head_shape(config: Any) -> tuple[int, int, int]:
    """Attention's heads, its key-value heads, and the numbers of one."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size
