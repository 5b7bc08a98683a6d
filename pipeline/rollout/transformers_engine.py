"""The default engine: a transformers model in this process, its KV cache kept from turn to turn.

The cache holds one row per episode and one slot per step; a row that has nothing to say in a step leaves a hole, which
the attention mask hides, which positions do not count and which is closed before the next turn. That turn's new tokens
are appended behind the last slot, so that nothing passes through the model twice; a prompt that several episodes share
passes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import DynamicCache

from pipeline.policy.model import Policy
from pipeline.rollout.engine import Continuation, Request, Sampling


class TransformersEngine:
    """See ``RolloutEngine``. The policy's weights are read at every call; call ``forget`` after changing them."""

    def __init__(self, policy: Policy, policy_version: int = 0) -> None:
        self.policy, self.policy_version = policy, policy_version
        configured = getattr(policy.model.generation_config, "eos_token_id", None)
        if configured is None:
            configured = policy.tokenizer.eos_token_id
        self._eos = set(configured if isinstance(configured, list) else [configured]) - {None}
        self.forget()

    def forget(self) -> None:
        """Drop the cache."""
        self._cache: Any = None
        self._keys: list[str] = []
        self._stored: list[list[int]] = []
        self._mask = torch.zeros((0, 0), dtype=torch.long)
        self.positions_computed = 0

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        """See ``RolloutEngine.generate``."""
        if not requests:
            return []
        was_training = self.policy.model.training
        self.policy.model.eval()
        logits = self._resume(requests) if self._holds(requests) else self._prefill(requests)
        result = self._decode(requests, sampling, logits)
        self.policy.model.train(was_training)
        return result

    def _holds(self, requests: Sequence[Request]) -> bool:
        """Whether every request continues what the cache holds for its key."""
        rows = {key: row for row, key in enumerate(self._keys)}
        for request in requests:
            stored = self._stored[rows[request.key]] if request.key in rows else None
            if stored is None or len(stored) >= len(request.ids) or list(request.ids[: len(stored)]) != stored:
                return False
        return True

    def _prefill(self, requests: Sequence[Request]) -> Tensor:
        """Start afresh: each distinct prefix passes through the model once. Returns logits (requests, vocabulary)."""
        self.forget()
        index: dict[tuple[int, ...], int] = {}
        rows = [index.setdefault(tuple(request.ids), len(index)) for request in requests]
        self._cache = DynamicCache(config=self.policy.model.config)
        self._mask = torch.zeros((len(index), 0), dtype=torch.long, device=self.policy.device)
        self._stored = [[] for _ in index]
        logits = self._append([list(prefix) for prefix in index])
        self._select(rows)
        self._keys = [request.key for request in requests]
        return logits[torch.tensor(rows, device=logits.device)]

    def _resume(self, requests: Sequence[Request]) -> Tensor:
        """Keep the requested rows and append what is new in each. Returns logits (requests, vocabulary)."""
        rows = [self._keys.index(request.key) for request in requests]
        if rows != list(range(len(self._keys))):
            self._select(rows)
        self._keys = [request.key for request in requests]
        self._close_holes()
        return self._append([list(r.ids[len(s) :]) for r, s in zip(requests, self._stored, strict=True)])

    def _select(self, rows: list[int]) -> None:
        chosen = torch.tensor(rows, device=self.policy.device)
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen]
        self._stored = [list(self._stored[row]) for row in rows]

    def _close_holes(self) -> None:
        """Move each row's filled slots together, to the right, and drop the columns that no row needs any more."""
        filled = self._mask.sum(-1)
        longest = int(filled.max())
        if longest == self._mask.shape[1]:
            return
        order = self._mask.argsort(dim=-1, stable=True)[:, -longest:]
        self._mask = self._mask.gather(1, order)
        slots = order[:, None, :, None]
        for layer in self._cache.layers:
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, slots.expand(shape))
            layer.values = layer.values.gather(2, slots.expand(shape))

    def _append(self, chunks: list[list[int]]) -> Tensor:
        """Run each row's new tokens, padded on the left; returns the logits after each row's last one."""
        width = max(map(len, chunks))
        ids = torch.zeros((len(chunks), width), dtype=torch.long)
        valid = torch.zeros((len(chunks), width), dtype=torch.long)
        for row, chunk in enumerate(chunks):
            if chunk:
                ids[row, width - len(chunk) :] = torch.tensor(chunk)
                valid[row, width - len(chunk) :] = 1
            self._stored[row] += chunk
            self.positions_computed += len(chunk)
        device = self.policy.device
        return self._forward(ids.to(device), valid.to(device))

    def _forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        before = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, valid], dim=1)
        output = self.policy.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=(before + valid.cumsum(-1) - 1).clamp_min(0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _decode(self, requests: Sequence[Request], sampling: Sampling, logits: Tensor) -> list[Continuation]:
        responses = [_Response(request, self.policy.tokenizer, sampling.stop) for request in requests]
        uniforms = np.zeros((len(requests), max(len(r.uniforms) for r in requests)))
        for row, request in enumerate(requests):
            uniforms[row, : len(request.uniforms)] = request.uniforms
        step = 0
        while True:
            draws = torch.from_numpy(uniforms[:, step]).to(logits.device)
            ids, logprob, entropy = (x.tolist() for x in sample(logits, sampling.temperature, draws))
            step += 1
            for row, response in enumerate(responses):
                if response.finish is None:
                    response.add(ids[row], logprob[row], entropy[row], self._eos)
            speaking = [response.finish is None for response in responses]
            if not any(speaking):
                break
            for row, (token, speaks) in enumerate(zip(ids, speaking, strict=True)):
                if speaks:
                    self._stored[row].append(token)
            self.positions_computed += sum(speaking)
            device = logits.device
            logits = self._forward(
                torch.tensor(ids, device=device).unsqueeze(1), torch.tensor(speaking, device=device).long().unsqueeze(1)
            )
        return [response.continuation(self.policy_version) for response in responses]


def sample(logits: Tensor, temperature: float, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invert the cumulative distribution at one uniform draw per row.

    Args:
        logits: (rows, vocabulary), raw.
        temperature: divides them.
        draws: float64 (rows,) in [0, 1).

    Returns:
        token (rows,), its log-probability and the distribution's entropy in nats, both float32.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probability = logprobs.exp()
    cumulative = probability.double().cumsum(-1)
    token = torch.searchsorted(cumulative, (draws * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    token = token.clamp_max(logits.shape[-1] - 1)
    entropy = -torch.xlogy(probability, probability).sum(-1)
    return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1), entropy


class _Response:
    """One row's response while it grows."""

    def __init__(self, request: Request, tokenizer: Any, stop: str) -> None:
        self.ids: list[int] = []
        self.logprob: list[float] = []
        self.entropy: list[float] = []
        self.finish: str | None = None
        self._limit, self._stop = len(request.uniforms), stop
        self._backend, self._stream, self._tail = (
            tokenizer.backend_tokenizer,
            DecodeStream(skip_special_tokens=False),
            "",
        )
        for token in list(request.ids)[len(request.ids) - request.forced :]:
            self._read(token)

    def add(self, token: int, logprob: float, entropy: float, eos: set[int]) -> None:
        self.ids.append(token)
        self.logprob.append(logprob)
        self.entropy.append(entropy)
        self._read(token)
        if self._stop in self._tail:
            self.finish = "stop"
        elif token in eos:
            self.finish = "eos"
        elif len(self.ids) >= self._limit:
            self.finish = "length"

    def _read(self, token: int) -> None:
        piece = self._stream.step(self._backend, token)
        if piece:
            self._tail = self._tail[-len(self._stop) :] + piece

    def continuation(self, policy_version: int) -> Continuation:
        return Continuation(self.ids, self.logprob, self.entropy, self.finish or "length", policy_version)
