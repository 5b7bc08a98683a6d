"""A plan: what an iteration costs on some devices, which schedule suits them, and how long the comparison takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipeline.analysis.readiness import Pace, hours
from pipeline.objective.estimates import declared_heads
from pipeline.objective.methods import surrogate_plan
from pipeline.planning.constants import constants_of, predicted
from pipeline.planning.devices import Device
from pipeline.planning.lengths import Lengths
from pipeline.planning.memory import FULL, Holding, held, sizes
from pipeline.planning.schedules import KINDS, Load, Schedule, Timeline, best, spread_steps
from pipeline.planning.shapes import Shape
from pipeline.planning.work import OPTIMIZER_BYTES, PlannedIteration, Work, sampling_work
from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError

GAIN = 0.15
"""Share of an iteration that one step ahead must save before it is recommended: its episodes are of older weights, and their
ratios must be corrected."""
SIMULATED = 4
"""Iterations of a schedule that are simulated."""


class Fleet(NamedTuple):
    """What is planned on."""

    device: Device
    devices: int
    processor: bool
    """It is the processor of a machine, and no GPU."""
    workers: int
    """Trainings that share a device: those of a processor; on GPUs one, on all of them."""


@dataclass(frozen=True)
class Plan:
    """What an iteration of one method on one environment costs."""

    environment: str
    iteration: PlannedIteration
    work: Mapping[str, Work]
    seconds: Mapping[str, float]
    """On one device, by phase."""
    spread: float
    """See ``Lengths.spread``."""
    runs: Mapping[Schedule, Timeline]
    """Of the schedules for which there are devices enough."""
    holds: Mapping[Schedule, Holding]
    sharded: Mapping[Schedule, bool]
    """Whether what is trained must be spread over the devices (FSDP) to fit."""
    fits: Mapping[Schedule, bool]
    recommended: Schedule | None
    """None: nothing fits."""


def planned(
    config: Config, environment: str, method: str, shape: Shape, lengths: Lengths, fleet: Fleet
) -> PlannedIteration:
    """An iteration to be counted, with batches as large as the device's memory allows.

    Raises:
        UserError: not a single episode fits.
    """
    found = sizes(config, environment, shape, fleet.device.memory, fleet.processor, fleet.workers)
    return PlannedIteration(config, method, shape, lengths, *found, processor=fleet.processor)


def longest_method(config: Config, environment: str, shape: Shape, lengths: Lengths, fleet: Fleet) -> str:
    """The method whose iterations take longest on a device; of several the first."""
    kinds: dict[tuple[int, int, bool], str] = {}
    for name, row in config.methods.items():
        heads = declared_heads(row.advantage).values()
        own = sum(head.kind == "model" for head in heads)
        kinds.setdefault((len(heads), own, surrogate_plan(row) is not None), name)
    return max(kinds.values(), key=lambda method: iteration_time(config, environment, method, shape, lengths, fleet))


def iteration_time(
    config: Config, environment: str, method: str, shape: Shape, lengths: Lengths, fleet: Fleet
) -> float:
    """Seconds of a method's iteration on one device."""
    work = planned(config, environment, method, shape, lengths, fleet).counted()
    return sum(predicted(fleet.device.fit, work).values())


def make_plan(iteration: PlannedIteration, environment: str, fleet: Fleet, spread: float) -> Plan:
    """Count, time and simulate an iteration, and say which schedule suits it."""
    work = iteration.counted()
    runs, holds, sharded, fits = (
        dict[Schedule, Timeline](),
        dict[Schedule, Holding](),
        dict[Schedule, bool](),
        dict[Schedule, bool](),
    )
    for kind in KINDS:
        spread_over = 1
        for spread_over in (1, fleet.devices):
            holds[kind] = held(iteration, spread_over)
            fits[kind] = _fits(holds[kind], kind, fleet)
            if fits[kind]:
                break
        sharded[kind] = spread_over > 1
    seconds = predicted(fleet.device.fit, work)
    plan = Plan(environment, iteration, work, seconds, spread, runs, holds, sharded, fits, None)
    found = {kind: schedule(plan, fleet, kind, spread) for kind in KINDS}
    runs |= {kind: run for kind, run in found.items() if run is not None}
    for kind, run in runs.items():
        if sharded[kind]:  # only those that train have a share
            holds[kind] = held(iteration, run.training)
            fits[kind] = _fits(holds[kind], kind, fleet)
    return replace(plan, recommended=_recommended(runs, fits))


def schedule(plan: Plan, fleet: Fleet, kind: Schedule, spread: float) -> Timeline | None:
    """A schedule's best run on a fleet; None where it has too few devices."""
    load = load_of(plan.iteration, plan.work, fleet, kind, plan.sharded[kind] and fleet.devices > 1, spread)
    return best(load, kind, fleet.devices)


def _fits(holding: Holding, kind: Schedule, fleet: Fleet) -> bool:
    parts = (holding.both,) if kind == "colocated" else (holding.sampling, holding.training)
    return all(sum(part.values()) <= FULL * fleet.device.memory / fleet.workers for part in parts)


def _recommended(runs: Mapping[Schedule, Timeline], fits: Mapping[Schedule, bool]) -> Schedule | None:
    possible = {kind: run for kind, run in runs.items() if fits[kind]}
    now = {kind: run for kind, run in possible.items() if kind != "ahead"}
    if not possible:
        return None
    first: Schedule = min(now or possible, key=lambda kind: possible[kind].seconds)
    ahead = possible.get("ahead")
    saves = ahead is not None and ahead.seconds < (1 - GAIN) * possible[first].seconds
    return "ahead" if saves else first


def load_of(
    iteration: PlannedIteration, work: Mapping[str, Work], fleet: Fleet, kind: Schedule, sharded: bool, spread: float
) -> Load:
    """What an iteration costs devices, for ``schedules.simulate``.

    Measurements of how far updates move the policy, and what keeps the books, are taken to run on one device alone.
    """
    fit, shape, lengths = fleet.device.fit, iteration.shape, iteration.lengths
    seconds = predicted(fit, work)
    episodes, layers = len(lengths), shape.config.num_hidden_layers
    step = Work(bytes=float(iteration.size * shape.read), layers=float(layers + 1))
    steps = work["decoding"].layers / step.layers
    sampling, update = fit[constants_of("decoding")], fit["update"]
    whole, tokens = sampling.seconds(work["decoding"]), float(lengths.sampled.sum())
    each = max(0.0, whole - steps * sampling.seconds(step) + seconds["environment"]) / tokens
    batches = iteration.minibatches()
    played, minibatch = sum(map(len, batches)), max(map(len, batches))
    fixed = update.seconds(
        Work(bytes=float(OPTIMIZER_BYTES * shape.trained), layers=work["update"].layers / len(batches))
    )
    link = fleet.device.link
    reduced = 4 * shape.trained / link
    if sharded:  # weights are gathered for both passes over each piece, gradients scattered
        pieces = sum(len(iteration.reading(chosen)) for chosen in batches) / len(batches)
        reduced = (2 * iteration.update_size * shape.parameters + 4 * shape.trained) / 2 / link * pieces
    sent = 0.0 if kind == "colocated" else iteration.size * shape.parameters / link
    return Load(
        steps=spread_steps(lengths.sampled, spread, SIMULATED),
        slots=iteration.slots,
        prefill=sampling.seconds(_prefill(iteration, fleet.devices)) / episodes,
        step=sampling.seconds(step),
        token=each,
        annotation=(seconds["annotation"] + seconds["values"]) / episodes,
        updates=len(batches),
        minibatch=minibatch,
        trained=max(0.0, seconds["update"] - len(batches) * fixed) / played,
        update=fixed,
        reduced=reduced,
        synchronised=seconds["synchronising"] + sent,
        rest=seconds["update KL"] + seconds["gradient shares"] + seconds["bookkeeping"],
    )


def _prefill(iteration: PlannedIteration, devices: int) -> Work:
    """Each device computes a prompt for those members of a group that it plays: dealt one by one, on many devices each alone."""
    own = iteration.lengths
    place = np.arange(len(own)) % min(devices, len(own))
    apart = np.unique(np.stack([own.group, place]), axis=1, return_inverse=True)[1]
    return sampling_work(iteration.shape, replace(own, group=apart.ravel()), iteration.slots)[0]


def comparison_hours(config: Config, plans: Mapping[str, Plan], fleet: Fleet) -> dict[str, float]:
    """Hours of each part of the comparison, by ``readiness.hours``; trainings in the schedule that is recommended.

    Episodes that are only played are spread over all devices.

    Raises:
        UserError: nothing fits.
    """
    config = config.model_copy(update={"workers": fleet.workers})
    total: dict[str, float] = {}
    for environment, plan in plans.items():
        if plan.recommended is None:
            raise UserError(f"{environment}: nothing fits")
        pace = pace_of(plan)
        alone = sum(plan.seconds.values())
        faster = plan.runs[plan.recommended].iteration / alone
        factors = {"training": faster, "matching": faster, "policy": 1.0}
        for part, spent in hours(config, {environment: pace}).items():
            share = 1 / len(plans) if part == "policy" else 1.0
            total[part] = total.get(part, 0.0) + spent * factors.get(part, 1 / fleet.devices) * share
    return total


def pace_of(plan: Plan) -> Pace:
    """Seconds of an episode on one device."""
    episodes, seconds = len(plan.iteration.lengths), plan.seconds
    sampled = sum(seconds[phase] for phase in ("prefill", "decoding", "environment", "synchronising"))
    annotated = seconds["annotation"] + seconds["values"]
    rest = sum(seconds.values()) - sampled - annotated
    return Pace(sampled / episodes, annotated / episodes, rest / episodes / plan.iteration.config.train.passes)
