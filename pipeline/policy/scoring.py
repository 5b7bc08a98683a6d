"""Log-probability, entropy and log-partition of given tokens under a policy, without a (batch, time, vocabulary) tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.policy.model import Policy

LOGITS_PER_CHUNK = 2**24
"""Float32 logits held at once: 64 MB."""


class TokenScores(NamedTuple):
    """Statistics of the distributions that predict n tokens."""

    logprob: Float[Tensor, " n"]
    """log pi(token), of the tempered distribution."""
    entropy: Float[Tensor, " n"]
    """Entropy in nats of the tempered distribution."""
    logsumexp: Float[Tensor, " n"]
    """Log-partition of the raw logits; the token energy is its negative (arXiv 2605.14558)."""


def length_batches(lengths: Sequence[int] | np.ndarray, budget: int) -> list[np.ndarray]:
    """Partition sequences into batches of similar length whose padded size stays within ``budget`` tokens.

    A sequence longer than the budget is a batch of its own.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")[::-1]
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(int(index))
        else:
            batches.append([int(index)])
    return [np.array(batch) for batch in batches]


def predicting_hidden(
    policy: Policy,
    sequences: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    backbone: torch.nn.Module | None = None,
) -> Float[Tensor, "n width"]:
    """Hidden states at the positions that predict the wanted tokens.

    Args:
        policy: whose trunk reads the sequences.
        sequences: token ids, one array per sequence; padded here, on the right.
        wanted: bool masks of the same lengths; the first token of a sequence cannot be wanted, nothing predicts it.
        backbone: another trunk to use instead.

    Returns:
        One row per wanted token, sequence after sequence.

    Raises:
        ValueError: a first token is wanted.
    """
    if any(mask[0] for mask in wanted):
        raise ValueError("the first token of a sequence has no prediction")
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    attention = np.zeros((len(sequences), longest), dtype=np.int64)
    positions = np.zeros((len(sequences), longest), dtype=bool)
    for row, (sequence, mask) in enumerate(zip(sequences, wanted, strict=True)):
        ids[row, : len(sequence)] = sequence
        attention[row, : len(sequence)] = 1
        positions[row, : len(sequence) - 1] = mask[1:]
    output = (backbone or policy.backbone)(
        input_ids=torch.from_numpy(ids).to(policy.device),
        attention_mask=None if attention.all() else torch.from_numpy(attention).to(policy.device),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[torch.from_numpy(positions).to(policy.device)]


def score_tokens(
    hidden: Float[Tensor, "n width"], tokens: Int[Tensor, " n"], head: torch.nn.Linear, temperature: float
) -> TokenScores:
    """Score tokens from the hidden states that predict them, a chunk of logits at a time.

    With gradients enabled, a chunk's logits are computed again in the backward pass instead of being kept.

    Args:
        hidden: last hidden states.
        tokens: the tokens that were chosen there.
        head: the output head.
        temperature: divides the logits for log-probability and entropy, not for the log-partition.
    """
    size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    parts = []
    for start in range(0, len(tokens), size):
        piece = slice(start, start + size)
        if torch.is_grad_enabled() and len(tokens) > size:
            parts.append(checkpoint(_score_chunk, hidden[piece], tokens[piece], head, temperature, use_reentrant=False))
        else:
            parts.append(_score_chunk(hidden[piece], tokens[piece], head, temperature))
    if not parts:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return TokenScores(empty, empty, empty)
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _score_chunk(hidden: Tensor, tokens: Tensor, head: torch.nn.Linear, temperature: float) -> tuple[Tensor, ...]:
    logits = head(hidden).float()
    raw = torch.logsumexp(logits, dim=-1)
    if temperature != 1.0:
        logits = logits / temperature
        normaliser = torch.logsumexp(logits, dim=-1)
    else:
        normaliser = raw
    logprob = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normaliser
    probability = torch.softmax(logits, dim=-1)
    entropy = normaliser - (probability * logits).sum(-1)
    return logprob, entropy, raw
