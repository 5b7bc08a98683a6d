"""The likeliest tokens wherever one was sampled, for branches that begin with one of them."""

from typing import NamedTuple

import numpy as np
import torch

from pipeline.model.policy import Policy
from pipeline.model.scoring import LOGITS_PER_CHUNK, batches_of, predicting_hidden
from pipeline.model.shards import gathered
from pipeline.trajectories.trajectory import Trajectories


class Likeliest(NamedTuple):
    """Of N tokens, at those that were sampled."""

    tokens: np.ndarray
    """int32 (N, k): the likeliest first, none of which ends the sequence; 0 where not sampled."""
    logprob: np.ndarray
    """float32 (N, k): of each."""


@torch.inference_mode()
def likeliest(
    policy: Policy, trajectories: Trajectories, temperature: float, tokens_per_forward: int, count: int
) -> Likeliest:
    """The ``count`` likeliest tokens at every sampled one's place, or all that there are."""
    count = min(count, len(policy.tokenizer) - len(policy.ends))
    shape = len(trajectories.input_ids), count
    result, sequences = (
        Likeliest(np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)),
        trajectories.sequences,
    )
    for batch in batches_of(policy, sequences, tokens_per_forward):
        spans = [trajectories.tokens(e) for e in batch]
        wanted = [trajectories.sampled[span] for span in spans]
        places = np.concatenate([np.arange(s.start, s.stop)[w] for s, w in zip(spans, wanted, strict=True)])
        found = gathered(policy.model, _likeliest, policy, [sequences[e] for e in batch], wanted, temperature, count)
        for column, values in zip(result, found, strict=True):
            column[places] = values.cpu().numpy()
    return result


def _likeliest(
    policy: Policy, sequences: list[np.ndarray], wanted: list[np.ndarray], temperature: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, known = predicting_hidden(policy, sequences, wanted), len(policy.tokenizer)
    tokens, logprobs = list[torch.Tensor](), list[torch.Tensor]()
    for piece in hidden.split(max(1, LOGITS_PER_CHUNK // policy.head.out_features)):
        logprob = (policy.logits(piece).float() / temperature).log_softmax(-1)
        logprob[:, known:] = -torch.inf  # padding of the head, which no token has
        logprob[:, sorted(policy.ends)] = -torch.inf
        best = logprob.topk(count, dim=-1)
        tokens.append(best.indices)
        logprobs.append(best.values)
    return torch.cat(tokens), torch.cat(logprobs)
