"""Units of work: what is played together, and environments that act at the same time."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium
import pytest

from pipeline.environments.frozen_lake import FrozenLake
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.making import make_engine
from pipeline.rollout.sampler import make_sampler, sample_episodes
from pipeline.rollout.specs import iteration_specs, units
from pipeline.settings.params import Config
from pipeline.trajectories.table import to_table
from pipeline.trajectories.trajectory import Trajectories, concatenate
from tests.scripted import always, config, play, says
from tests.trainings import LAKE, configured

PATIENCE = 60.0
MEETING: list[threading.Barrier] = []
"""Where all environments must be at the same time before any of them acts first; empty: they do not wait."""


class Patient(FrozenLake):
    """A lake that acts as soon as all others are about to."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not getattr(self, "met", False):
            self.met = True
            for meeting in MEETING:
                meeting.wait(PATIENCE)
        return super().step(action)


gymnasium.register(id="actfocus_test/Patient-v0", entry_point=Patient, disable_env_checker=True)


def divided(episodes: int | None, groups: int = 4) -> Config:
    return configured(
        {"rollout": {"groups": groups, "group_size": 2, "unit_episodes": episodes}, "bottleneck": {"groups": groups}}
    )


def equal(one: Trajectories, other: Trajectories) -> bool:
    return bool(to_table(one).equals(to_table(other)))


@pytest.mark.parametrize(
    ("episodes", "sizes"), [(1, [2] * 5), (2, [2] * 5), (3, [4, 4, 2]), (4, [4, 4, 2]), (99, [10]), (None, [10])]
)
def test_units_are_whole_groups_in_order(episodes: int | None, sizes: list[int]) -> None:
    specs = iteration_specs(divided(None, 5), LAKE, 0, 0)
    found = units(specs, episodes)
    assert [len(unit) for unit in found] == sizes
    assert [spec for unit in found for spec in unit] == specs


def test_a_unit_is_played_as_if_it_were_alone(policy: Policy) -> None:
    """Whatever its engine has played before; without units everything is played together."""
    parted, whole = divided(4), divided(None)
    specs = iteration_specs(parted, LAKE, 0, 0)
    shared = policy.tokenizer, parted, LAKE
    alone = [collect(make_engine(parted, policy), *shared, unit, 1.0) for unit in units(specs, 4)]
    assert len(alone) == 2
    sampler = make_sampler(parted, policy)
    assert equal(sample_episodes(sampler, *shared, specs, 1.0), concatenate(alone))
    together = collect(make_engine(whole, policy), *shared, specs, 1.0)
    assert equal(sample_episodes(sampler, policy.tokenizer, whole, LAKE, specs, 1.0), together)


def test_environments_that_wait_act_at_the_same_time() -> None:
    """None of them would ever act if fewer did so at once; what they do is the same one by one."""

    def played(at_once: int) -> Trajectories:
        settings = config({"environments_at_once": at_once}, id="actfocus_test/Patient-v0")
        return play(settings, always(says("Right")))[0]

    MEETING.append(threading.Barrier(6))
    try:
        waited = played(6)
    finally:
        MEETING.clear()
    assert len(waited) == 6
    assert all(waited.turns["valid"])
    assert equal(waited, played(1))
    assert equal(waited, played(2))
