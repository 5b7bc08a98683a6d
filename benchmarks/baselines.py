"""What a knowledgeable user of plain transformers would write: the other side of our ratios."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.model.policy import Policy
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling


class GenerateEngine:
    """A ``RolloutEngine`` that calls ``model.generate`` once a turn, on all episodes still going, padded on the left.

    Draws are PyTorch's own, so episodes are alike but not equal to ours. The response's log-probabilities come from the
    processed scores that ``generate`` returns, as a training would need them.
    """

    policy_version = 0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sync(self, policy: Policy, version: int) -> None:
        """See ``RolloutEngine.sync``."""
        self.policy, self.policy_version = policy, version

    def forget(self) -> None:
        """Nothing is kept from call to call."""

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        """See ``RolloutEngine.generate``."""
        pending, last = dict(enumerate(requests)), dict[int, Continuation]()
        while pending:
            answers = self._turn(list(pending.values()), sampling)
            for number, answer in zip(list(pending), answers, strict=True):
                last[number] = answer
                request = None if follow is None else follow(number, answer)
                if request is None:
                    del pending[number]
                else:
                    pending[number] = request
        return [last[number] for number in sorted(last)]

    def _turn(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        tokenizer, model = self.policy.tokenizer, self.policy.model
        (end,) = tokenizer(sampling.stop, add_special_tokens=False)["input_ids"]
        longest = max(len(r.ids) for r in requests)
        ids = torch.full((len(requests), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, longest - len(request.ids) :] = 1
        limit = max(len(r.uniforms) for r in requests)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limit,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            eos_token_id=[end, tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        sampled = output.sequences[:, longest:]
        scores = torch.stack(output.scores, dim=1).log_softmax(-1)
        logprob = scores.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
        entropy = -(scores.exp() * scores).sum(-1)
        return [
            _continuation(sampled[row], logprob[row], entropy[row], end, tokenizer.eos_token_id, len(r.uniforms))
            for row, r in enumerate(requests)
        ]


def _continuation(ids: Tensor, logprob: Tensor, entropy: Tensor, stop: int, eos: int, limit: int) -> Continuation:
    tokens = ids.tolist()[:limit]
    length = next((i + 1 for i, token in enumerate(tokens) if token in (stop, eos)), limit)
    finish = {stop: "stop", eos: "eos"}.get(tokens[length - 1], "length")
    return Continuation(tokens[:length], logprob[:length].tolist(), entropy[:length].tolist(), finish, 0)


def padded_scores(
    policy: Policy, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the wanted tokens by a padded forward pass with logits everywhere."""
    longest = max(map(len, sequences))
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    chosen = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, (sequence, want) in enumerate(zip(sequences, wanted, strict=True)):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        mask[row, : len(sequence)] = 1
        chosen[row, : len(sequence)] = torch.from_numpy(want)
    logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(-1)
    logprob = logprobs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprob[chosen[:, 1:]], entropy[chosen[:, 1:]]
