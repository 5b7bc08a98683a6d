"""Drawn trajectories for tests of their files and columns."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import CUT, RESPONSE_ROLES, Role, Trajectories

properties = settings(max_examples=40)


ANNOTATIONS = ("energy", "ref_logprob", "ref_entropy")


NUMBERS = st.floats(-50, 50, width=32)


REWARDS = st.sampled_from([0.0, 1.0, -0.1, 0.25])


STRINGS = st.text(max_size=6)


@st.composite
def episodes(draw: st.DrawFn, number: int = 0) -> EpisodeBuilder:
    builder = EpisodeBuilder(
        episode_id=f"{number}-{draw(STRINGS)}",
        group_id=draw(st.sampled_from(["a", "b", "é√"])),
        environment="actfocus/FrozenLake-v1",
        state_key=draw(STRINGS),
        seed=draw(st.integers(0, 2**40)),
        iteration=draw(st.integers(0, 9)),
        policy_version=draw(st.integers(0, 9)),
    )
    if draw(st.booleans()):
        builder.identity |= {"parent": "0", "split": draw(st.integers(0, 99))}
    if draw(st.booleans()):
        builder.identity["temperature"] = draw(st.floats(0.1, 3))
    ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)
    builder.append_text(draw(ids), Role.PROMPT)
    for turn in range(draw(st.integers(0, 3))):
        if turn:
            builder.append_text(draw(ids), Role.OBSERVATION)
        start = len(builder)
        builder.append_text(draw(ids), Role.THINK_TAG)
        tokens = draw(
            st.lists(st.tuples(st.integers(0, 999), st.sampled_from(RESPONSE_ROLES), NUMBERS, NUMBERS), max_size=5)
        )
        builder.append_sampled(*([token[i] for token in tokens] for i in range(4)))
        reward = draw(REWARDS) if tokens else 0.0
        ended = draw(st.sampled_from(["stop", "eos", *CUT]))
        builder.close_turn(start, reward, draw(STRINGS), draw(st.booleans()), draw(STRINGS), draw(st.booleans()), ended)
    builder.finish(draw(st.booleans()), draw(st.sampled_from(["goal", "failed", "turns", "context"])))
    return builder


@st.composite
def tables(draw: st.DrawFn, least: int = 0) -> Trajectories:
    count = draw(st.integers(least, 4))
    made = build([draw(episodes(number)) for number in range(count)])
    if not draw(st.booleans()):
        return made
    noise = np.random.default_rng(draw(st.integers(0, 999)))
    columns = {name: noise.standard_normal(len(made.input_ids)).astype(np.float32) for name in ANNOTATIONS}
    return replace(made, **columns)


def assert_equal(one: Trajectories, other: Trajectories) -> None:
    for field in fields(Trajectories):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def one_episode(**identity: Any) -> EpisodeBuilder:
    """Two turns of two sampled tokens, the first with a prefilled tag."""
    known = {"episode_id": "e", "group_id": "g", "environment": "x", "state_key": "s"}
    builder = EpisodeBuilder(**{**known, "seed": 0, "iteration": 0, "policy_version": 0, **identity})
    builder.append_text([1, 2], Role.PROMPT)
    builder.append_text([3], Role.THINK_TAG)
    builder.append_sampled([4, 5], [Role.REASONING, Role.ACTION], [-1.0, -2.0], [0.5, 0.25])
    builder.close_turn(2, -0.1, "", False, "s0")
    builder.append_text([6], Role.OBSERVATION)
    builder.append_sampled([7, 8], [Role.ACTION, Role.ANSWER_TAG], [-3.0, -4.0], [0.75, 1.0])
    builder.close_turn(6, 1.0, "Up", True, "s1")
    builder.finish(True, "goal")
    return builder
