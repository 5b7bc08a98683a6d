"""Which episodes are played, and where their randomness comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.environments import initial_states, make
from pipeline.settings.params import Config
from pipeline.workspace.randomness import generator


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to be played, and where its randomness comes from."""

    episode_id: str
    group_id: str
    state_seed: int
    seed: int
    iteration: int
    noise: int
    """Seed of the environment's noise."""
    draws: tuple[Any, ...]
    """Name of the generator that the episode's tokens are drawn from: seed, stream, counters."""


def iteration_specs(config: Config, name: str, seed: int, iteration: int) -> list[EpisodeSpec]:
    """The episodes of one iteration of training: ``rollout.groups`` states of the train split, ``group_size`` each.

    They depend on (environment, seed, iteration) alone, so every method meets the same states and the same noise.
    """
    draws = generator(seed, "train states", name, iteration)
    states = initial_states(make(config.environments[name]), "train", config.rollout.groups, draws)
    return group_specs(name, states, config.rollout.group_size, seed, iteration, "train")


def group_specs(
    name: str, states: Sequence[int], group_size: int, seed: int, iteration: int, purpose: str
) -> list[EpisodeSpec]:
    """``group_size`` episodes of each initial state, with noise and draws of their own."""
    specs = []
    for group, state in enumerate(states):
        group_id = f"{name}-{purpose}-{seed}-{iteration}-{group}"
        for member in range(group_size):
            place = (name, purpose, iteration, group, member)
            noise, draws = generator(seed, "environment noise", *place).integers(2**31), (seed, "tokens", *place)
            specs.append(EpisodeSpec(f"{group_id}-{member}", group_id, state, seed, iteration, int(noise), draws))
    return specs


def units(specs: Sequence[EpisodeSpec], episodes: int | None) -> list[Sequence[EpisodeSpec]]:
    """Units of work in order: whole groups, as many as make so many ``episodes`` or more; None: a single one."""
    if episodes is None:
        return [specs]
    found: list[list[EpisodeSpec]] = []
    for _, group in groupby(specs, key=lambda spec: spec.group_id):
        if not found or len(found[-1]) >= episodes:
            found.append([])
        found[-1] += group
    return [*found]
