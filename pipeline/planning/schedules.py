"""Schedules of an iteration on many devices, event by event.

* ``colocated``: all devices sample, then all of them annotate and train.
* ``disaggregated``: some sample, the others annotate what is finished and train; each side waits for the other.
* ``ahead``: likewise, but the next iteration is sampled while this one is trained on, with weights that are one older.

An episode takes a step of its device's engine for each token that is sampled; a step takes longer the more episodes are in
it. Episodes are dealt to the devices one by one, and each device has as many at once as it has slots.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np
import simpy

Schedule = Literal["colocated", "disaggregated", "ahead"]
KINDS: tuple[Schedule, ...] = ("colocated", "disaggregated", "ahead")
SHARES = (1 / 8, 1 / 4, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Of the devices that sample, where others train: the best of these is taken."""


@dataclass(frozen=True)
class Load:
    """What an iteration costs its devices, in seconds."""

    steps: Sequence[Sequence[int]]
    """Sampled tokens of every episode, iteration by iteration; (iterations, episodes)."""
    slots: int
    """Episodes that a device samples together."""
    prefill: float
    """Of an episode's prompt and observations."""
    step: float
    """Of a step, whatever is in it."""
    token: float
    """Of a token of a step."""
    annotation: float
    """Of an episode, on one device."""
    updates: int
    minibatch: int
    """Episodes of an update, spread over the devices that train."""
    trained: float
    """Of an episode of an update, on one device."""
    update: float
    """Of an update, whatever is in it."""
    reduced: float
    """Of adding up the gradients of two devices; more devices take up to twice as long, in a ring."""
    synchronised: float
    """Of giving the weights to those that sample."""
    rest: float
    """Of an iteration, on one device alone."""


@dataclass(frozen=True)
class Timeline:
    """How a schedule went."""

    kind: Schedule
    sampling: int
    """Devices that sample."""
    training: int
    """Devices that train; in ``colocated`` they are the same ones."""
    iterations: int
    seconds: float
    """Until the last iteration's weights are there."""
    busy: float
    """Share of the devices' time in which they compute."""

    @property
    def iteration(self) -> float:
        """Seconds of one, on average."""
        return self.seconds / self.iterations


def simulate(load: Load, kind: Schedule, sampling: int, training: int) -> Timeline:
    """Run a schedule to its end; the devices that sample and train are the same ones in ``colocated``."""
    run = _Run(load, kind, sampling, sampling if kind == "colocated" else training)
    seconds = run.finish()
    devices = sampling if kind == "colocated" else sampling + training
    return Timeline(kind, sampling, run.training, len(load.steps), seconds, run.work / (devices * seconds))


def best(load: Load, kind: Schedule, devices: int) -> Timeline | None:
    """The fastest way to split devices for a schedule; None where there are too few."""
    if kind == "colocated":
        return simulate(load, kind, devices, devices)
    splits = sorted({min(devices - 1, max(1, round(share * devices))) for share in SHARES}) if devices > 1 else []
    return min((simulate(load, kind, n, devices - n) for n in splits), key=lambda run: run.seconds, default=None)


def shortest(load: Load) -> float:
    """Seconds below which no number of devices brings a schedule whose iterations follow one another: the longest episode
    alone on a device, the annotation of one episode, and every update with one episode a device."""
    longest = sum(max(steps) for steps in load.steps) * (load.step + load.token)
    each = load.prefill + load.annotation + load.updates * (load.trained + load.update) + load.synchronised + load.rest
    return longest + len(load.steps) * each


def spread_steps(mean: Sequence[int] | np.ndarray, spread: float, iterations: int, seed: int = 0) -> list[list[int]]:
    """Sampled tokens of episodes that take longer or shorter by chance: log-normal factors with mean 1 and a standard
    deviation of ``spread``; the same draws for every schedule."""
    width = np.sqrt(np.log1p(spread**2))
    draws = np.random.default_rng(seed)
    factors = np.exp(draws.normal(-(width**2) / 2, width, size=(iterations, len(mean))))
    return [[max(1, round(float(n))) for n in row] for row in np.asarray(mean) * factors]


Events = Generator[Any, Any, None]


class _Run:
    """A schedule under way."""

    def __init__(self, load: Load, kind: Schedule, sampling: int, training: int) -> None:
        self.load, self.kind, self.sampling, self.training = load, kind, sampling, training
        self.clock = simpy.Environment()
        self.work = 0.0
        """Seconds of devices that compute."""
        self.versions = [self.clock.event() for _ in load.steps]
        """Each happens when an iteration's weights have arrived."""
        self.finished = [simpy.Store(self.clock) for _ in load.steps]
        """Episodes, iteration by iteration."""

    def finish(self) -> float:
        """Until the last weights have arrived; returns the seconds."""
        self.clock.process(self._sampler())
        self.clock.process(self._trainer())
        self.clock.run(self.versions[-1])
        return float(self.clock.now)

    def _sampler(self) -> Events:
        age = 2 if self.kind == "ahead" else 1
        for number, steps in enumerate(self.load.steps):
            if number >= age:
                yield self.versions[number - age]
            dealt = [steps[first :: self.sampling] for first in range(self.sampling)]
            yield self.clock.all_of([self.clock.process(self._device(own, number)) for own in dealt if own])

    def _device(self, steps: Sequence[int], number: int) -> Events:
        """One device samples its episodes; between two that end nothing changes."""
        waiting, active, done, load = list(reversed(steps)), list[int](), 0, self.load
        while waiting or active:
            begun = 0
            while waiting and len(active) < load.slots:
                heappush(active, done + waiting.pop())
                begun += 1
            spent = begun * load.prefill + (active[0] - done) * (load.step + len(active) * load.token)
            self.work += spent
            yield self.clock.timeout(spent)
            done = active[0]
            while active and active[0] == done:
                heappop(active)
                yield self.finished[number].put(done)

    def _trainer(self) -> Events:
        """Annotates an iteration's episodes as they come (in ``colocated``: when all are there), and trains on them."""
        load, devices = self.load, simpy.Resource(self.clock, self.training)
        for number, steps in enumerate(load.steps):
            annotated, arrived = [], list[Any]()
            for _ in steps:
                arrived.append((yield self.finished[number].get()))
                if self.kind != "colocated":
                    annotated.append(self.clock.process(self._annotated(devices)))
            if self.kind == "colocated":
                annotated = [self.clock.process(self._annotated(devices)) for _ in arrived]
            yield self.clock.all_of(annotated)
            yield self.clock.timeout(load.updates * self._update() + load.rest)
            learning = min(self.training, load.minibatch)  # the others have no part of a minibatch
            self.work += load.updates * (load.minibatch * load.trained + load.update * learning) + load.rest
            yield self.clock.timeout(load.synchronised)
            self.versions[number].succeed()

    def _annotated(self, devices: simpy.Resource) -> Events:
        with devices.request() as free:
            yield free
            self.work += self.load.annotation
            yield self.clock.timeout(self.load.annotation)

    def _update(self) -> float:
        """Seconds of one: each device has a part of the minibatch, and the slowest decides."""
        load, count = self.load, min(self.training, self.load.minibatch)
        return -(-load.minibatch // count) * load.trained + load.update + load.reduced * 2 * (count - 1) / count
