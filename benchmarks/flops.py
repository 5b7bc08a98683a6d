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
from typing import Any

import numpy as np


def forward_flops(config: Any, lengths: Sequence[int] | np.ndarray, wanted: Sequence[np.ndarray]) -> float:
    """One forward pass over whole sequences.

    Args:
        config: the transformers configuration of a Qwen2 or Llama shape.
        lengths: tokens of each sequence.
        wanted: for each sequence a bool mask of the tokens to be predicted.
    """
    heads, groups, size = _heads(config)
    tokens, rows = int(np.sum(lengths)), int(sum(mask.sum() for mask in wanted))
    query_side = 2 * heads * size * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    key_side = 2 * groups * size * config.hidden_size
    pairs = float(sum(length * (length + 1) / 2 for length in lengths))
    wanted_pairs = float(sum(np.flatnonzero(mask).sum() for mask in wanted))  # token t is predicted from t others
    before, per_pair = config.num_hidden_layers - 1, 4 * heads * size
    linear = before * tokens * (query_side + key_side) + tokens * key_side + rows * query_side
    attention = per_pair * (before * pairs + wanted_pairs)
    return float(2 * linear + attention + 2 * rows * config.hidden_size * config.vocab_size)


def sampling_flops(config: Any, prompts: Sequence[int], lengths: Sequence[int], sampled: int) -> float:
    """Sampling episodes whose prompts are computed once a group.

    Args:
        config: see ``forward_flops``.
        prompts: tokens of each distinct prompt.
        lengths: tokens of each episode, its prompt's first ones among them; as many episodes for each prompt.
        sampled: how many of the tokens were sampled; each needs one row of logits.
    """
    heads, groups, size = _heads(config)
    share = len(lengths) // len(prompts)
    own = sum(lengths) - share * sum(prompts)
    pairs = sum(n * (n + 1) / 2 for n in lengths) - (share - 1) * sum(n * (n + 1) / 2 for n in prompts)
    width = config.hidden_size
    per_token = width * (2 * (heads + groups) * size + 3 * config.intermediate_size)
    linear = config.num_hidden_layers * (own + sum(prompts)) * per_token
    attention = 4 * heads * size * config.num_hidden_layers * pairs
    return float(2 * linear + attention + 2 * sampled * width * config.vocab_size)


def _heads(config: Any) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, config.num_key_value_heads, size
