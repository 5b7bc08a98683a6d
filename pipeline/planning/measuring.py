"""Measurements of the machine at hand: small iterations of policies of several sizes, by the code that trains.

They are kept for each processor and number of threads, and constants are fitted on them whenever a plan is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch

from pipeline.analysis.timings import PREFIX, phase_seconds
from pipeline.bootstrap.scratch import bootstrap
from pipeline.model.policy import Policy
from pipeline.planning.constants import Timed, constants_of
from pipeline.planning.lengths import sampled_lengths
from pipeline.planning.processor import processor
from pipeline.planning.shapes import Shape
from pipeline.planning.work import PHASES, PlannedIteration, Work
from pipeline.progress.display import doing
from pipeline.settings.filter import AllGroups
from pipeline.settings.params import Config, Environment
from pipeline.settings.policy import Demonstrations, Phase, ScratchPolicy
from pipeline.training.module import PolicyGradient
from pipeline.training.run import try_iteration
from pipeline.training.update_kl import ROLES
from pipeline.workspace.files import read_record, write_record
from pipeline.workspace.layout import Cache, Layout

LAKE = "frozen_lake"
SIZES = {"0.2 M": (64, 2, 4), "1.1 M": (128, 4, 4), "3 M": (256, 4, 8), "20 M": (512, 6, 8)}
"""Hidden size, layers and heads of the policies that are measured, by their parameters; the largest is the last."""
REPEATS = 2
"""Of each iteration; the shortest time of each phase counts."""


class Variant(NamedTuple):
    """An iteration that is measured."""

    groups: int
    group_size: int
    turns: int
    response: int
    """Tokens of a response, at most."""


VARIANTS = (Variant(2, 8, 2, 16), Variant(4, 16, 2, 16), Variant(2, 8, 4, 48), Variant(4, 8, 4, 24))


def measurements() -> Path:
    """Where what was measured here is kept: for this device and number of threads."""
    return Cache().folder / "plan" / f"{quote(device_name(), safe='')}-{torch.get_num_threads()}.json"


def device_name() -> str:
    """The GPU's name, or the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def measure(
    config: Config,
    sizes: Mapping[str, tuple[int, int, int]] = SIZES,
    variants: Sequence[Variant] = VARIANTS,
    repeats: int = REPEATS,
) -> list[Timed]:
    """Time iterations of every size and variant on FrozenLake, with the slots of the first method that does not branch."""
    points = []
    for name, shape in sizes.items():
        doing(f"making a policy of {name} parameters")
        policy = _random_policy(*shape)
        for number, variant in enumerate(variants):
            doing(f"{name} parameters, iteration {number + 1} of {len(variants)}")
            points.append(_point(name, policy, _small(config, variant), variant, repeats))
    return points


def keep(points: Sequence[Timed], target: Path) -> None:
    """Write points as JSON, with the name of what they were measured on."""
    rows = [{**point._asdict(), "work": {k: list(v) for k, v in point.work.items()}} for point in points]
    write_record(target, {"device": device_name(), "threads": torch.get_num_threads(), "points": rows})


def kept_points(source: Path) -> list[Timed]:
    """What ``keep`` has written."""
    return [
        Timed(row["name"], row["shape"], {k: Work(*v) for k, v in row["work"].items()}, row["seconds"])
        for row in read_record(source)["points"]
    ]


def _random_policy(width: int, layers: int, heads: int) -> Policy:
    """From scratch after one step of supervision: how well it plays does not matter here."""
    few = Demonstrations(
        phases=[Phase(steps=1, reasoning_words=(0, 2), action_noise=0.5)], episodes=20, batch_episodes=2
    )
    settings = ScratchPolicy(
        kind="scratch", hidden_size=width, layers=layers, heads=heads, vocabulary=420, demonstrations=few
    )
    policy = bootstrap(settings, {LAKE: _lake(VARIANTS[0])}, lambda *_: None)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def _lake(variant: Variant) -> Environment:
    return Environment(
        id="actfocus/FrozenLake-v1",
        settings={"size": 4, "max_actions": 8},
        max_turns=variant.turns,
        response_tokens=variant.response,
        context_tokens=1024,
    )


def _small(config: Config, variant: Variant) -> Config:
    """The params file with the iteration that is measured in place of its own."""
    name = next(iter([*(n for n, row in config.methods.items() if row.branching.kind == "none"), *config.methods]))
    row = config.methods[name].model_copy(update={"filter": AllGroups(kind="all"), "matched_to": None})
    count = variant.groups * variant.group_size
    once = {"iterations": 1, "tokens": None, "passes": 1, "minibatch": count // 2, "schedule": "constant", "lora": None}
    rollout = {"groups": variant.groups, "group_size": variant.group_size, "prefill": ""}
    return config.model_copy(
        update={
            "environments": {LAKE: _lake(variant)},
            "methods": {name: row},
            "rollout": config.rollout.model_copy(update=rollout),
            "train": config.train.model_copy(update=once),
        }
    )


def _point(size: str, policy: Policy, config: Config, variant: Variant, repeats: int) -> Timed:
    method, (least, work) = next(iter(config.methods)), (dict[str, float](), dict[str, Work]())
    for _ in range(repeats):
        module = PolicyGradient(config, LAKE, method, 0, policy)
        _time_synchronising(module)
        spent = try_iteration(module)
        assert module.last_episodes is not None
        shape = Shape(size, policy.model.config, policy.model.dtype)
        budget, slots = module.learner.tokens_per_forward, config.rollout.batch_episodes
        on_processor = policy.device.type == "cpu"
        counted = PlannedIteration(
            config,
            method,
            shape,
            sampled_lengths(module.last_episodes),
            slots,
            budget,
            processor=on_processor,
            number=0,
        )
        work = counted.counted()
        if not np.isin(module.last_episodes.role[module.last_episodes.sampled], list(ROLES.values())).any():
            work["update KL"] = Work()  # there was no token to measure it on
        for name, seconds in seconds_by_name(spent).items():
            least[name] = min(seconds, least.get(name, math.inf))
    name = f"{size}, {variant.groups} x {variant.group_size} episodes, {variant.turns} x {variant.response} tokens"
    return Timed(name, size, work, least)


def seconds_by_name(spent: Mapping[str, float]) -> dict[str, float]:
    """What a training's timings say of an iteration, by name of the constants."""
    names = {key: constants_of(phase) for phase, keys in PHASES.items() for key in keys}
    result: dict[str, float] = {}
    for key, name in names.items():
        if f"{PREFIX}{key}" in spent:
            result[name] = result.get(name, 0.0) + spent[f"{PREFIX}{key}"]
    return result


def recorded(layout: Layout, config: Config, environment: str) -> dict[str, float]:
    """Mean seconds of an iteration of the trainings that this params file has made, by method.

    What a training does between two iterations (validation, tracking, checkpoints) is no part of it.
    """
    files = {name: layout.timings(environment, name) for name in config.methods}
    result = {}
    for name, file in files.items():
        curves = read_record(file)["seeds"] if file.exists() else {}
        spent = {f"{PREFIX}{phase}": seconds for phase, seconds in phase_seconds(curves).items()}
        if spent:
            result[name] = sum(seconds_by_name(spent).values())
    return result


def _time_synchronising(module: PolicyGradient) -> None:
    """Let the engine's taking over of weights be a phase of its own; it is part of two others elsewhere."""
    sync = module.engine.sync

    def timed(policy: Policy, version: int) -> None:
        with module.phases.phase("synchronise"):
            sync(policy, version)

    module.engine.sync = timed  # type: ignore[method-assign]
