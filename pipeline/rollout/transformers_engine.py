"""The default engine: a transformers model in this process, its KV cache kept from turn to turn.

Sampling goes in steps. In a step every episode at hand hands in what is new in it - the token just sampled, or a prompt,
or an observation - and gets one token back; all that is new passes through the model as one packed batch. An episode
that ends makes room for the next that waits, so the batch stays full, and nobody waits for the end of anybody's turn.

Where memory is bounded, no more episodes are begun than fit if all of them get as long as they may: one that has begun
always goes on, and nothing is computed twice for want of memory. What they do not need holds episodes that are over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from pipeline.model.kernels import native
from pipeline.model.packed_weights import PackedWeights
from pipeline.model.policy import Policy
from pipeline.model.trunk import hidden_states
from pipeline.progress.display import beat, due
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.key_value_cache import SlotCache
from pipeline.workspace.finite import NumericsError, require_finite

TOKENS_PER_STEP = 8192
"""Tokens that pass through the model together; what does not fit waits for the next step. Bounds the memory that prompts
take."""


class Bound(NamedTuple):
    """What keys and values may take."""

    gigabytes: float
    """Of 10^9 bytes."""
    context: int
    """Tokens that an episode has at most."""


class TransformersEngine:
    """See ``RolloutEngine``. As many episodes are sampled at once as there are ``slots``, or as fit within a bound.

    The policy's weights are read at every call; call ``sync`` after changing them.

    Raises:
        UserError: not a single episode fits.
    """

    def __init__(self, policy: Policy, slots: int = 128, policy_version: int = 0, bound: Bound | None = None) -> None:
        self.policy, self.slots, self.bound = policy, slots, bound
        self._ends: dict[str, frozenset[int]] = {}
        self._cache: SlotCache | None = None
        self.sync(policy, policy_version)
        self._at_once()

    def sync(self, policy: Policy, version: int) -> None:
        """See ``RolloutEngine.sync``. Of another policy than its own the engine takes over the weights, in its own precision."""
        if policy is not self.policy:
            self.policy.follow(policy)
        self._followed, self._linear = policy, PackedWeights(self.policy, self.slots)
        self._computed_with = self._changes()
        self.forget()
        self.policy_version = version

    def forget(self) -> None:
        """See ``RolloutEngine.forget``; the cache's memory is used again."""
        if self._cache is not None:
            for slot in range(self.slots):
                self._cache.drop(slot)
        self._stored = np.full((self.slots, 0), -1, dtype=np.int64)
        self._idle = list(range(self.slots))
        """Slots without an episode, the one that has been idle longest first: what it holds is given up first."""
        self._prompt_logits: dict[tuple[int, ...], Tensor] = {}
        self.positions_computed = 0
        """Tokens that have passed through the model since."""

    def _at_once(self) -> int:
        """How many episodes are sampled together at most."""
        if self.bound is None:
            return self.slots
        return min(self.slots, self._held().episodes(self.bound.context))

    def _changes(self) -> int:
        """How often the weights of what the engine samples from have been written to in place."""
        weights = self._followed.model.parameters()
        return sum(0 if p.is_inference() else p._version for p in weights)

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        """See ``RolloutEngine.generate``.

        Raises:
            NumericsError: the weights have changed since ``sync``, or a logit is not a number.
        """
        if self._changes() != self._computed_with:
            raise NumericsError(
                "the policy's weights have changed, and what the engine holds is of those before: sync()"
            )
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            return self._converse(requests, sampling, follow)
        finally:
            self.policy.model.train(was_training)

    def _converse(self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None) -> list[Continuation]:
        waiting, active, most = enumerate(requests), list[_Row](), self._at_once()
        last: dict[int, Continuation] = {}
        try:
            while True:
                active += self._admit(waiting, active, most)
                if not active:
                    break
                speaking, logits = self._step(active)
                if due():
                    beat(sum(len(row.ids) for row in active))
                for row in self._sample(speaking, logits, sampling):
                    numbers = row.ids, row.logprob, row.entropy
                    last[row.number] = Continuation(*numbers, row.finish, self.policy_version)
                    request = None if follow is None else follow(row.number, last[row.number])
                    if request is None:
                        active.remove(row)
                        self._idle.append(row.slot)
                    else:
                        row.go_on(request)
        finally:  # where something has raised, rows are left
            self._idle += [row.slot for row in active]
        return [last[number] for number in sorted(last)]

    def _admit(self, waiting: Iterator[tuple[int, Request]], active: list[_Row], most: int) -> list[_Row]:
        """Fill idle slots with waiting requests, each behind the longest beginning of it that any slot holds.

        There are ``most`` rows then, or fewer. A request whose prompt another one is about to compute gets nothing to
        compute: see ``_step``.
        """
        admitted = list[_Row]()
        computing = {row.prompt for row in active if row.new and not row.started}
        while self._idle and len(active) + len(admitted) < most and (following := next(waiting, None)) is not None:
            row = _Row(*following)
            row.slot = self._idle.pop(0)
            if row.prompt not in computing:
                source, held = self._longest_stored(row.prompt)
                if held == len(row.prompt):
                    row.logits = self._prompt_logits.get(row.prompt)
                known = held if row.logits is not None else min(held, len(row.prompt) - 1)
                self._copy(source, row, known)
                row.new = list(row.prompt[known:])
                if row.new:
                    computing.add(row.prompt)
            admitted.append(row)
        return admitted

    def _copy(self, source: int, row: _Row, length: int) -> None:
        """Let a row begin with what another slot holds."""
        self._held().copy(source, row.slot, length)
        row.length = length
        self._stored[row.slot] = -1
        self._store(np.full(length, row.slot), np.arange(length), np.array(row.prompt[:length]))

    def _longest_stored(self, ids: tuple[int, ...]) -> tuple[int, int]:
        """The slot that holds the longest beginning of ``ids``, and how long that is."""
        width = min(len(ids), self._stored.shape[1])
        agree = np.logical_and.accumulate(self._stored[:, :width] == np.array(ids[:width]), axis=1).sum(1)
        best = int(agree.argmax())
        return best, int(agree[best])

    def _store(self, slots: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> None:
        """Note which tokens the cache holds."""
        more = int(positions.max(initial=-1)) + 1 - self._stored.shape[1]
        if more > 0:
            self._stored = np.pad(self._stored, ((0, 0), (0, more + self._stored.shape[1])), constant_values=-1)
        self._stored[slots, positions] = ids

    def _held(self) -> SlotCache:
        device, dtype = self.policy.device, self.policy.model.dtype
        if self._cache is None or self._cache.device != device or self._cache.dtype != dtype:
            gigabytes = self.bound.gigabytes if self.bound else math.inf
            self._cache = SlotCache(self.policy.model.config, self.slots, device, dtype, gigabytes)
        return self._cache

    def _reserve(self, cache: SlotCache, row: _Row) -> None:
        """Make room for a row's new tokens; what has been idle longest is given up first."""
        end, idle = row.length + len(row.new), iter(self._idle)
        while not cache.reserve(row.slot, row.length, end):
            slot = next(idle, None)
            if slot is None:
                raise ValueError(f"an episode of {end} tokens, where {self.bound} was to be enough for every one")
            cache.drop(slot)
            self._stored[slot] = -1

    def _step(self, active: list[_Row]) -> tuple[list[_Row], Tensor]:
        """Pass what is new through the model once; returns the rows that may now sample, and their logits."""
        speaking, total = list[_Row](), 0
        for row in active:
            if row.new and (not speaking or total + len(row.new) <= TOKENS_PER_STEP):
                speaking.append(row)
                total += len(row.new)
        logits = [self._forward(speaking)] if speaking else []
        for row in active:
            if row.started or row.new or row in speaking:
                continue
            if row.logits is None:  # another row computes the same prompt, in this step or a later one
                source, held = self._longest_stored(row.prompt)
                row.logits = self._prompt_logits.get(row.prompt) if held == len(row.prompt) else None
                if row.logits is None:
                    continue
                self._copy(source, row, held)
            speaking.append(row)
            logits.append(row.logits)
        return speaking, torch.cat(logits)

    def _forward(self, rows: list[_Row]) -> Tensor:
        """Logits (rows, vocabulary) behind each row's new tokens, which then are stored."""
        counts = np.array([len(row.new) for row in rows])
        ends = counts.cumsum()
        cache, device = self._held(), self.policy.device
        for row in rows:
            if row.length + len(row.new) > cache.room[row.slot]:
                self._reserve(cache, row)
        slots = np.repeat([row.slot for row in rows], counts)
        starts = np.array([row.length for row in rows])
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        ids = np.fromiter((token for row in rows for token in row.new), dtype=np.int64, count=ends[-1])
        attend = cache.attention(slots, positions)
        new, places, last = (torch.from_numpy(column).to(device) for column in (ids, positions, ends - 1))
        hidden = hidden_states(self.policy.backbone, new, places, attend, last, self._linear)
        logits = self.policy.logits(hidden, self._linear)
        self._store(slots, positions, ids)
        for index, row in enumerate(rows):
            row.length += len(row.new)
            row.new = []
            if not row.started:
                self._remember(row.prompt, logits[index : index + 1])
        self.positions_computed += int(ends[-1])
        return logits

    def _remember(self, prompt: tuple[int, ...], logits: Tensor) -> None:
        """Keep the logits behind a prompt for the others that have it; of the oldest no more than there are slots."""
        self._prompt_logits.pop(prompt, None)
        self._prompt_logits[prompt] = logits
        if len(self._prompt_logits) > self.slots:
            del self._prompt_logits[next(iter(self._prompt_logits))]

    def _sample(self, rows: list[_Row], logits: Tensor, sampling: Sampling) -> list[_Row]:
        """One token for every row; returns the rows whose continuation is now complete."""
        draws = np.array([row.request.uniforms[len(row.ids)] for row in rows])

        def place(index: int) -> str:
            return f"token {rows[index].length} of episode {rows[index].request.episode}"

        sampled = sample(logits, sampling.temperature, torch.from_numpy(draws).to(logits.device), place)
        ends, eos, complete = self._may_end(sampling.stop), self.policy.ends, []
        for row, token, logprob, entropy in zip(rows, *(column.tolist() for column in sampled), strict=True):
            row.started = True
            row.new.append(token)
            row.ids.append(token)
            row.logprob.append(logprob)
            row.entropy.append(entropy)
            if token in ends and sampling.stop in self._text(row):
                row.finish = "stop"
            elif token in eos:
                row.finish = "eos"
            elif len(row.ids) == len(row.request.uniforms):
                row.finish = "length"
            if row.finish:
                complete.append(row)
        return complete

    def _text(self, row: _Row) -> str:
        """What the response says so far, forced tokens included."""
        forced = list(row.request.ids)[len(row.request.ids) - row.request.forced :]
        return str(self.policy.tokenizer.backend_tokenizer.decode([*forced, *row.ids], skip_special_tokens=False))

    def _may_end(self, stop: str) -> frozenset[int]:
        """Tokens that can complete a response: they begin with an end of the stop text, or contain it, or are part of a
        character, or end the sequence."""
        if stop not in self._ends:
            backend, count = self.policy.tokenizer.backend_tokenizer, len(self.policy.tokenizer)
            texts = backend.decode_batch([[token] for token in range(count)], skip_special_tokens=False)
            tails = tuple(stop[start:] for start in range(len(stop)))
            found = (
                token for token, text in enumerate(texts) if text.startswith(tails) or stop in text or "\ufffd" in text
            )
            self._ends[stop] = frozenset(found) | self.policy.ends
        return self._ends[stop]


@dataclass(eq=False)
class _Row:
    """One episode at hand."""

    number: int
    request: Request
    slot: int = -1
    length: int = 0
    """Tokens of it that its slot holds."""
    new: list[int] = field(default_factory=list)
    """Tokens that have yet to pass through the model."""
    logits: Tensor | None = None
    """Behind its prompt, where another row has computed them."""
    started: bool = False
    """Its prompt has been computed, and something sampled behind it."""
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    finish: str = ""

    def __post_init__(self) -> None:
        self.prompt = tuple(self.request.ids)
        """The first request's prefix."""

    def go_on(self, request: Request) -> None:
        """Take up the same episode's next request; it must begin with all that was said so far."""
        self.request = request
        self.new = list(request.ids[self.length :])
        self.ids, self.logprob, self.entropy, self.finish = [], [], [], ""


def sample(
    logits: Float[Tensor, "rows vocabulary"],
    temperature: float,
    draws: Float64[Tensor, " rows"],
    place: Callable[[int], str] | None = None,
) -> tuple[Int[Tensor, " rows"], Float32[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """Invert the cumulative distribution at one uniform draw, in [0, 1), per row; the temperature divides the raw logits.

    ``place`` says in words which token a row is to give.

    Returns:
        Token, its log-probability and the distribution's entropy in nats.

    Raises:
        NotFiniteError: a logit is NaN or infinite, or all of a row are minus infinity; minus infinity is an impossible token.
    """
    require_finite("the policy's largest logit", logits.amax(-1), place)
    if native.scores(logits):
        return native.sample(logits, temperature, draws)
    return sample_by_torch(logits, temperature, draws)


def sample_by_torch(logits: Tensor, temperature: float, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for any device and precision."""
    scaled = logits.float() / temperature
    normaliser = torch.logsumexp(scaled, dim=-1)
    probability = (scaled - normaliser.unsqueeze(-1)).exp_()
    cumulative = probability.double().cumsum(-1)
    token = torch.searchsorted(cumulative, (draws * cumulative[:, -1]).unsqueeze(-1), right=True)
    token = token.clamp_max(logits.shape[-1] - 1)
    logprob = scaled.gather(-1, token).squeeze(-1) - normaliser
    return token.squeeze(-1), logprob, normaliser - torch.linalg.vecdot(probability, scaled.clamp_min(-1e30))
