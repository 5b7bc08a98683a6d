"""What a worker does in a process of its own: it plays episodes with an engine and environments that it holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.making import make_engine
from pipeline.rollout.specs import EpisodeSpec
from pipeline.settings.params import Config
from pipeline.trajectories.table import to_table

LINE = 64
"""Bytes of the longest vector of a processor, and of a line of its caches."""


class Begun(NamedTuple):
    """The policy that a pool begins with."""

    policy: Policy
    places: Sequence[int]
    """Of each of its weights, where it lies in the memory of the process that asks, by its address modulo ``LINE``: matrix
    products sum the same numbers in another order where weights begin elsewhere in a line, as those of a mapped file may."""

    def placed(self) -> Policy:
        """The policy, its weights where they lay, in place."""
        for weight, place in zip(self.policy.model.parameters(), self.places, strict=True):
            space = torch.empty(weight.nbytes + LINE, dtype=torch.uint8)
            start = (place - space.data_ptr()) % LINE
            there = space[start : start + weight.nbytes].view(weight.dtype).view_as(weight)
            weight.data = there.copy_(weight.data)
        return self.policy


def begun(policy: Policy) -> Begun:
    """What workers are given of a policy."""
    return Begun(policy, [weight.data_ptr() % LINE for weight in policy.model.parameters()])


class Weights(NamedTuple):
    """What a policy's trained weights are since a sync."""

    serial: int
    """Of the sync: equal weights are taken over once."""
    version: int
    arrays: Mapping[str, np.ndarray]
    """By name of the parameter its numbers as bytes, uint8; those that are not there have stayed as they were."""


def as_bytes(weight: Tensor) -> np.ndarray:
    """uint8: the bytes of a tensor of any precision, of which numpy does not know all."""
    numbers: np.ndarray = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return numbers


class Worker:
    """An engine, and the environments of the episodes that it plays. From one unit of work to the next it keeps weights alone."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.serial = config, 0
        self.policy: Policy | None = None

    def play(
        self,
        name: str,
        specs: Sequence[EpisodeSpec],
        temperature: float,
        closing: bool,
        begun: Sequence[Any],
        weights: Weights,
    ) -> pa.Table:
        """Play a unit of work from an empty cache, with these weights; returns its episodes as ``to_table`` has them.

        ``begun`` is where Ray has what ``begun`` gives, in a list: it is fetched for a process's first unit alone.

        Raises:
            UserError: see ``collect``.
        """
        if self.policy is None:
            import ray

            found: Begun = ray.get(begun[0])
            self.policy = found.placed()
            self.engine = make_engine(self.config, self.policy)
        if weights.serial != self.serial:
            self._take_over(self.policy, weights)
        shared = self.engine, self.policy.tokenizer, self.config, name
        return to_table(collect(*shared, specs, temperature, closing=closing))

    @torch.no_grad()
    def _take_over(self, policy: Policy, weights: Weights) -> None:
        own = dict(policy.model.named_parameters())
        for name, numbers in weights.arrays.items():
            weight = own[name]
            weight.copy_(torch.from_numpy(numbers.copy()).view(weight.dtype).view_as(weight))  # theirs are read-only
        self.engine.sync(policy, weights.version)
        self.serial = weights.serial
