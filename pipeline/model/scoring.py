"""Log-probability, entropy and log-partition of given tokens under a policy, without a (batch, time, vocabulary) tensor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.model.attention import packed_attention
from pipeline.model.kernels import native
from pipeline.model.policy import Policy, soft_capped, weights_for
from pipeline.model.shared_prefixes import gathered, prefix_batches, sharing
from pipeline.model.trunk import hidden_states

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


def batches_of(policy: Policy, sequences: Sequence[np.ndarray], budget: int) -> list[np.ndarray]:
    """Partition sequences into batches for ``predicting_hidden``, of at most ``budget`` tokens to be computed.

    Where sharing pays, those with a common beginning are side by side; else those of similar length, padding included. A
    sequence longer than the budget may be a batch of its own.
    """
    if sharing(sequences, policy.head.in_features) is not None:
        return prefix_batches(sequences, budget)
    return length_batches([len(sequence) for sequence in sequences], budget)


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
    """Hidden states at the positions that predict the wanted tokens, sequence after sequence.

    ``wanted`` are bool masks of the sequences' lengths. A ``backbone`` reads in place of the policy's. Hidden states have the
    precision in which the policy computes, and so have logits that are made of them. What sequences have in common at their
    beginning is computed once, where that pays.

    Raises:
        ValueError: a first token is wanted.
    """
    if any(mask[0] for mask in wanted):
        raise ValueError("the first token of a sequence has no prediction")
    lengths, device = [len(sequence) for sequence in sequences], policy.device
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
    predicting = np.flatnonzero(np.concatenate(wanted)) - 1
    attend, backbone = packed_attention(lengths, device), backbone or policy.backbone
    shared = sharing(sequences, policy.head.in_features)
    again: Tensor | None = None
    if shared is not None:  # one token may predict the next ones of several sequences, and they stand in any order
        computed, source = (torch.from_numpy(x).to(device) for x in shared)
        predicting, found = np.unique(shared.source[predicting], return_inverse=True)
        ids, positions, again = ids[computed], positions[computed], torch.from_numpy(found).to(device)
        attend = gathered(attend, computed, source)
    with policy.autocast():
        hidden = hidden_states(backbone, ids, positions, attend, torch.from_numpy(predicting).to(device))
    if policy.computing is not None:
        hidden = hidden.to(policy.computing)
    return hidden if again is None else hidden[again]


def score_tokens(
    hidden: Float[Tensor, "n width"],
    tokens: Int[Tensor, " n"],
    head: torch.nn.Linear,
    temperature: float,
    cap: float | None = None,
) -> TokenScores:
    """Score tokens from the hidden states that predict them, a chunk of logits at a time.

    No more than a chunk's logits are held, in the backward pass too, which computes them again. The temperature divides the
    logits for log-probability and entropy, not for the log-partition. ``cap`` is the policy's soft cap of raw logits.
    """
    return TokenScores(*_ScoreTokens.apply(hidden, *weights_for(hidden, head), tokens, temperature, cap))


class _ScoreTokens(torch.autograd.Function):
    """``score_tokens`` with its backward pass written out.

    With x = logits / T, z = logsumexp x and p = exp(x - z): ``d log p_a / dx_j = [j = a] - p_j`` and, with
    H = z - sum p x, ``dH / dx_j = -p_j (x_j - z + H)``; of the raw log-partition it is the raw probability. Of a soft cap
    ``y = c tanh(x / c)`` it is ``1 - (y / c)^2``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob, entropy, raw, normaliser = (hidden.new_empty(len(tokens), dtype=torch.float32) for _ in range(4))
        for piece in _chunks(len(tokens), len(weight)):
            logits = soft_capped(F.linear(hidden[piece], weight, bias).float(), cap)
            columns = (native.score if native.scores(logits) else _score)(logits, tokens[piece], temperature)
            for whole, part in zip((raw, normaliser, logprob, entropy), columns, strict=True):
                whole[piece] = part
        ctx.save_for_backward(hidden, weight, bias, tokens, entropy, raw, normaliser)
        ctx.temperature, ctx.cap = temperature, cap
        ctx.set_materialize_grads(False)
        return logprob, entropy, raw

    @staticmethod
    def backward(
        ctx: Any, to_logprob: Tensor | None, to_entropy: Tensor | None, to_raw: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, entropy, raw, normaliser = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        # A head that is frozen asks for no slope.
        to_weight, to_bias = (
            torch.zeros_like(x, dtype=torch.float32) if x is not None and asked else None
            for x, asked in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for piece in _chunks(len(tokens), len(weight)):
            logits = soft_capped(F.linear(hidden[piece], weight, bias).float(), ctx.cap)
            given = (to_logprob, to_entropy, to_raw)
            slopes = [torch.zeros_like(raw[piece]) if slope is None else slope[piece] for slope in given]
            slope_of = native.score_slope if native.scores(logits) else _score_slope
            known = (raw[piece], normaliser[piece], entropy[piece])
            through_cap = None if ctx.cap is None else 1 - (logits / ctx.cap).square()
            slope = slope_of(logits, tokens[piece], ctx.temperature, *known, slopes)
            if through_cap is not None:
                slope = slope * through_cap
            slope = slope.to(hidden.dtype)
            to_hidden[piece] = slope @ weight
            if to_weight is not None:
                to_weight += slope.t() @ hidden[piece]
            if to_bias is not None:
                to_bias += slope.sum(0)
        to_head = (None if slope is None else slope.to(weight.dtype) for slope in (to_weight, to_bias))
        return to_hidden, *to_head, None, None, None


def _score(logits: Tensor, tokens: Tensor, temperature: float) -> list[Tensor]:
    """Raw and tempered log-partition, log-probability and entropy of a chunk; overwrites the logits."""
    raw = torch.logsumexp(logits, dim=-1)
    normaliser = raw if temperature == 1.0 else torch.logsumexp(logits.div_(temperature), dim=-1)
    logprob = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normaliser
    probability = (logits - normaliser.unsqueeze(-1)).exp_()
    return [raw, normaliser, logprob, normaliser - torch.linalg.vecdot(probability, logits.clamp_min(-1e30))]


def _score_slope(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    raw: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    slopes: Sequence[Tensor],
) -> Tensor:
    """A loss's slope by a chunk's logits, from its slopes by log-probability, entropy and raw log-partition."""
    to_logprob, to_entropy, to_raw = (slope.unsqueeze(-1) for slope in slopes)
    slope = (logits - raw.unsqueeze(-1)).exp_().mul_(to_raw * temperature)
    surprise = logits.div_(temperature).sub_(normaliser.unsqueeze(-1))
    probability = surprise.exp()
    slope.addcmul_(surprise.add_(entropy.unsqueeze(-1)).mul_(probability), to_entropy, value=-1)
    slope.addcmul_(probability, to_logprob, value=-1)
    return slope.scatter_add_(-1, tokens.unsqueeze(-1), to_logprob).div_(temperature)


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]
