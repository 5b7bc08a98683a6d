"""Log-probability, entropy and log-partition of given tokens under a policy, without a (batch, time, vocabulary) tensor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.model.kernels import native
from pipeline.model.policy import Policy
from pipeline.model.trunk import hidden_states, packed_attention

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
    """Hidden states at the positions that predict the wanted tokens, sequence after sequence.

    ``wanted`` are bool masks of the sequences' lengths. A ``backbone`` reads in place of the policy's.

    Raises:
        ValueError: a first token is wanted.
    """
    if any(mask[0] for mask in wanted):
        raise ValueError("the first token of a sequence has no prediction")
    lengths, device = [len(sequence) for sequence in sequences], policy.device
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
    predicting = torch.from_numpy(np.flatnonzero(np.concatenate(wanted)) - 1).to(device)
    return hidden_states(backbone or policy.backbone, ids, positions, packed_attention(lengths, device), predicting)


def score_tokens(
    hidden: Float[Tensor, "n width"], tokens: Int[Tensor, " n"], head: torch.nn.Linear, temperature: float
) -> TokenScores:
    """Score tokens from the hidden states that predict them, a chunk of logits at a time.

    No more than a chunk's logits are held, in the backward pass too, which computes them again. The temperature divides the
    logits for log-probability and entropy, not for the log-partition.
    """
    return TokenScores(*_ScoreTokens.apply(hidden, head.weight, head.bias, tokens, temperature))


class _ScoreTokens(torch.autograd.Function):
    """``score_tokens`` with its backward pass written out.

    With x = logits / T, z = logsumexp x and p = exp(x - z): ``d log p_a / dx_j = [j = a] - p_j`` and, with
    H = z - sum p x, ``dH / dx_j = -p_j (x_j - z + H)``; of the raw log-partition it is the raw probability.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob, entropy, raw, normaliser = (hidden.new_empty(len(tokens), dtype=torch.float32) for _ in range(4))
        for piece in _chunks(len(tokens), len(weight)):
            logits = F.linear(hidden[piece], weight, bias).float()
            columns = (native.score if native.scores(logits) else _score)(logits, tokens[piece], temperature)
            for whole, part in zip((raw, normaliser, logprob, entropy), columns, strict=True):
                whole[piece] = part
        ctx.save_for_backward(hidden, weight, bias, tokens, entropy, raw, normaliser)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, entropy, raw

    @staticmethod
    def backward(
        ctx: Any, to_logprob: Tensor | None, to_entropy: Tensor | None, to_raw: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        hidden, weight, bias, tokens, entropy, raw, normaliser = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for piece in _chunks(len(tokens), len(weight)):
            logits = F.linear(hidden[piece], weight, bias).float()
            given = (to_logprob, to_entropy, to_raw)
            slopes = [torch.zeros_like(raw[piece]) if slope is None else slope[piece] for slope in given]
            slope_of = native.score_slope if native.scores(logits) else _score_slope
            known = (raw[piece], normaliser[piece], entropy[piece])
            slope = slope_of(logits, tokens[piece], ctx.temperature, *known, slopes).to(hidden.dtype)
            to_hidden[piece] = slope @ weight
            to_weight += slope.t() @ hidden[piece]
            if to_bias is not None:
                to_bias += slope.sum(0)
        return to_hidden, to_weight.to(weight.dtype), None if to_bias is None else to_bias.to(weight.dtype), None, None


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
