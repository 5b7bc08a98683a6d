"""What the phases of an iteration have to do: operations, bytes, starts of layers, tokens.

The counts follow the code: which tokens pass through which model, in how many forward passes, and what is computed more
than once. Four numbers a phase; how long they take is ``constants``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappush, heapreplace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from pipeline.model.scoring import length_batches
from pipeline.model.shared_prefixes import LEAST_WIDTH, prefix_batches, shared_tokens, sharing
from pipeline.objective.estimates import declared_heads
from pipeline.objective.methods import surrogate_plan
from pipeline.planning.flops import Reading, cached_flops, head_flops, reading_flops
from pipeline.planning.lengths import Lengths
from pipeline.planning.shapes import Shape
from pipeline.settings.params import Config
from pipeline.training.checks import ONE_OF
from pipeline.training.gradients import TOKENS_PER_ROLE
from pipeline.training.iteration import shuffled
from pipeline.training.update_kl import FIRST, ROLES, TOKENS, TRAJECTORIES

OPTIMIZER_BYTES = 40
"""Of a trained number in a step of Adam in float32: weight, gradient and two moments are read (16) and three of them written
(12); the gradient is read for its norm (4) and scaled (8)."""
ACCUMULATED_BYTES = 8
"""Of a trained number in a backward pass: its gradient is read and written."""
PHASES = {
    "prefill": ("collect",),
    "decoding": ("collect",),
    "environment": ("reset", "step"),
    "annotation": ("annotate",),
    "values": ("values",),
    "update": ("update",),
    "update KL": ("update_kl",),
    "gradient shares": ("gradients",),
    "bookkeeping": ("prepare", "advantages", "weights"),
    "synchronising": ("synchronise",),
}
"""What an iteration consists of -> what a training's timings call it (``seconds_<name>``). Prefill and decoding are one stretch
of time: their work is timed by the same constants. Synchronising is timed by ``measuring`` alone; trainings count it in
``collect`` and ``prepare``."""


class Work(NamedTuple):
    """What has to be done."""

    flops: float = 0.0
    """Of matrix products and attention."""
    bytes: float = 0.0
    """Read from memory and written to it: weights, activations, keys and values, logits."""
    layers: float = 0.0
    """Layers of a model that are started, whatever number of tokens passes through them."""
    tokens: float = 0.0
    """Tokens, or turns of an environment, that are handled one by one."""

    def times(self, factor: float) -> Work:
        return Work(*(factor * part for part in self))

    def plus(self, *others: Work) -> Work:
        return Work(*(sum(parts) for parts in zip(self, *others, strict=True)))


@dataclass(frozen=True)
class PlannedIteration:
    """An iteration of one method's training, to be counted."""

    config: Config
    method: str
    shape: Shape
    lengths: Lengths
    slots: int
    """Episodes that are sampled together."""
    budget: int
    """Tokens of a forward pass."""
    recomputes: bool = False
    """Layers compute their activations again in the backward pass."""
    processor: bool = False
    """It runs on a processor, and on no GPU."""
    number: int | None = None
    """None: an average iteration of a training; 0: its first one."""

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        """Token ids that share what a group shares, and nothing else."""
        own, most = self.lengths, int(self.lengths.group.max()) + 1
        return [
            np.r_[np.full(prompt, group), np.full(whole - prompt, most + index)]
            for index, (prompt, whole, group) in enumerate(zip(own.prompt, own.whole, own.group, strict=True))
        ]

    @property
    def size(self) -> int:
        """Bytes of a number in which sampling and annotation compute."""
        return self.shape.dtype.itemsize

    @property
    def update_size(self) -> int:
        """The same of an update: float16 is trained in float32."""
        return 4 if self.shape.dtype == torch.float16 else self.size

    def counted(self) -> dict[str, Work]:
        """Every phase's work."""
        prefill, decoding = sampling_work(self.shape, self.lengths, self.slots)
        episodes, turns = len(self.lengths), int(self.lengths.turns.sum())
        tokens = float(self.lengths.whole.sum())
        checked = Work(0, 12.0 * self.shape.trained, 0, tokens)
        return {
            "prefill": prefill,
            "decoding": decoding,
            "environment": Work(tokens=float(turns + episodes)),
            "annotation": self._annotation(),
            "values": self._values(),
            "update": self._update(),
            "update KL": self._update_kl(),
            "gradient shares": self._gradient_shares(),
            "bookkeeping": checked,
            "synchronising": self.synchronising(),
        }

    def synchronising(self) -> Work:
        """The engine takes over the weights once, on the device where they are trained."""
        packed = self.shape.packed if self.packs else 0
        copied = (4 + self.size) * self.shape.parameters if self.shape.copied else 0
        return Work(bytes=float(copied + 2 * self.size * packed), layers=float(self.shape.config.num_hidden_layers))

    def minibatches(self) -> list[np.ndarray]:
        """Episodes of each update."""
        return shuffled(len(self.lengths), self.config.train, 0, 0)

    def reading(self, chosen: Sequence[int] | np.ndarray) -> list[Reading]:
        """The forward passes over some episodes."""
        return readings(self.shape, self.lengths, [self.sequences[i] for i in chosen], np.asarray(chosen), self.budget)

    def forward(self, chosen: Sequence[int] | np.ndarray, size: int) -> Work:
        """One forward pass over some episodes, with the scores of their sampled tokens."""
        parts = (forward_work(self.shape, read, size) for read in self.reading(chosen))
        return Work().plus(*parts)

    def _annotation(self) -> Work:
        """The reference policy's scores; the policy's own, of all in a first iteration, else of the few that are checked."""
        everyone = np.arange(len(self.lengths))
        once = self.forward(everyone, self.size)
        checked = 1.0 if self.number == 0 else min(1.0, (max(1, len(everyone) // ONE_OF) + 1) / len(everyone))
        rescored = self.forward(everyone, self.update_size) if self.shape.copied else Work()
        return once.plus(once.times(checked), rescored)

    @property
    def packs(self) -> bool:
        """Whether weights are arranged anew for sampling (``PackedWeights``, where the memory has room)."""
        return self.processor and bool(self.shape.config.hidden_size >= LEAST_WIDTH)

    @property
    def trunks(self) -> int:
        """Networks beside the policy that have a trunk of their own."""
        heads = declared_heads(self.config.methods[self.method].advantage)
        return sum(head.kind == "model" for head in heads.values())

    def _values(self) -> Work:
        if not declared_heads(self.config.methods[self.method].advantage):
            return Work()
        return self.forward(range(len(self.lengths)), self.update_size).times(1 + self.trunks)

    def _update(self) -> Work:
        """Forward and backward passes of all minibatches, with what is computed again, and the optimizer's steps."""
        backward = 2.0 if self.shape.lora is None else 1.0
        again = float(self.recomputes) + float(surrogate_plan(self.config.methods[self.method]) is not None)
        times, total = (1 + backward + again) * (1 + self.trunks), Work()
        trained = self.shape.trained * (1 + self.trunks)
        for chosen in self.minibatches():
            passes = self.forward(chosen, self.update_size)
            logits = head_flops(self.shape.config, float(self.lengths.sampled[chosen].sum()))  # the backward pass again
            pieces = passes.layers / (self.shape.config.num_hidden_layers + 1)
            moved = Work(logits, trained * (OPTIMIZER_BYTES + ACCUMULATED_BYTES * pieces), 1.0)
            total = total.plus(passes.times(times), moved)
        return total._replace(tokens=total.tokens / times)

    def _update_kl(self) -> Work:
        """A forward pass over a sample before the updates and after each, where they are measured."""
        train, sample = self.config.train, range(min(TRAJECTORIES, len(self.lengths)))
        rows = float(min(len(ROLES) * TOKENS, self.lengths.sampled[list(sample)].sum()))
        passes = self.forward(sample, self.update_size)
        vocabulary = self.shape.config.vocab_size
        divergence = Work(bytes=rows * vocabulary * 8 * 8)  # in double precision, eight times over
        once = passes.plus(divergence).times(1 + len(self.minibatches()))
        measured = min(1.0, FIRST / train.iterations + 1 / train.validate_every)
        return once if self.number == 0 else once.times(measured)

    def _gradient_shares(self) -> Work:
        """A forward pass and some tokens' backward passes over a few trajectories, where they are measured."""
        train, few = self.config.train, min(self.config.train.gradient_trajectories, len(self.lengths))
        one = Work().plus(*(self.forward([i], self.update_size) for i in range(few)))
        backward = (2.0 if self.shape.lora is None else 1.0) * TOKENS_PER_ROLE * self.lengths.roles
        return one.times((1 + backward) * (1.0 if self.number == 0 else 1 / train.validate_every))


def readings(
    shape: Shape, lengths: Lengths, sequences: Sequence[np.ndarray], chosen: Int[np.ndarray, " n"], budget: int
) -> list[Reading]:
    """The forward passes over some sequences: what they have in common at their beginning is computed once, where that pays.

    Sampled tokens are taken to be spread evenly behind the prompt.
    """
    shared = sharing(sequences, shape.config.hidden_size) is not None
    sizes = [len(sequence) for sequence in sequences]
    result = []
    for batch in prefix_batches(sequences, budget) if shared else length_batches(sizes, budget):
        whole, rows = lengths.whole[chosen[batch]], lengths.sampled[chosen[batch]]
        starts = np.zeros(len(batch), dtype=np.int64)
        if sharing([sequences[i] for i in batch], shape.config.hidden_size) is not None:
            own = shared_tokens([sequences[i] for i in batch]).computed
            owner = np.repeat(np.arange(len(batch)), whole)[own]
            starts = whole - np.bincount(owner, minlength=len(batch))
        pairs = whole * (whole + 1) / 2 - starts * (starts + 1) / 2
        at = (lengths.prompt[chosen[batch]] + whole - 1) / 2
        result.append(Reading(float((whole - starts).sum()), pairs.sum(), float(rows.sum()), float((rows * at).sum())))
    return result


def forward_work(shape: Shape, read: Reading, size: int) -> Work:
    """One forward pass: weights are read once, activations and logits written and read once."""
    layers = shape.config.num_hidden_layers
    activations = 2 * size * read.tokens * layers * shape.layer_numbers
    logits = 2 * 4 * read.wanted * shape.config.vocab_size
    moved = size * shape.read + activations + logits
    return Work(reading_flops(shape.config, read), float(moved), float(layers + 1), read.tokens)


def sampling_work(shape: Shape, lengths: Lengths, slots: int) -> tuple[Work, Work]:
    """Prefill, of prompts and observations, and decoding.

    A group's prompt is computed once. Observations pass through the model in steps that others decode in, so that steps,
    and the weights that they read, are counted as decoding.
    """
    config, size, layers = shape.config, shape.dtype.itemsize, shape.config.num_hidden_layers
    first = np.unique(lengths.group, return_index=True)[1]
    given = lengths.whole - lengths.prompt - lengths.sampled  # observations
    prompts = lengths.prompt[first].astype(float)
    at = (lengths.prompt + lengths.whole - 1) / 2 + 1  # what a token behind the prompt attends to
    pairs = float((prompts * (prompts + 1) / 2).sum() + (given * at).sum())
    read = float(prompts.sum() + given.sum())
    activations = 2.0 * size * layers * shape.layer_numbers
    prefill = Work(cached_flops(config, read, pairs, 0), activations * read, 0.0, read)
    sampled, decoded = float(lengths.sampled.sum()), float((lengths.sampled * at).sum())
    steps = engine_steps(lengths.sampled, slots)
    moved = steps * size * shape.read + decoded * size * shape.token_numbers + activations * sampled
    moved += 2 * 4 * sampled * config.vocab_size
    return prefill, Work(cached_flops(config, sampled, decoded, sampled), moved, float(steps * (layers + 1)), sampled)


def engine_steps(sampled: Int[np.ndarray, " e"], slots: int) -> int:
    """Steps of an engine: an episode takes one for each of its tokens, and the next that waits gets the slot that is free."""
    ends: list[int] = []
    for tokens in sampled.tolist():
        if len(ends) < slots:
            heappush(ends, tokens)
        else:
            heapreplace(ends, ends[0] + tokens)
    return max(ends, default=0)
