"""Schedules against closed forms, and what must hold of every one of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.planning.schedules import KINDS, Load, best, shortest, simulate, spread_steps

EVEN = Load(
    steps=[[100] * 16] * 5,
    slots=8,
    prefill=0.25,
    step=0.02,
    token=0.001,
    annotation=0.5,
    updates=2,
    minibatch=8,
    trained=0.75,
    update=0.125,
    reduced=0.0,
    synchronised=0.5,
    rest=0.25,
)
"""16 episodes of 100 tokens, five iterations."""


def sampled(load: Load, devices: int) -> float:
    """Seconds of sampling where all episodes have the same length and fill the slots of every device evenly."""
    each = len(load.steps[0]) // devices
    waves, at_once = max(1, each // load.slots), min(each, load.slots)
    return waves * (at_once * load.prefill + load.steps[0][0] * (load.step + at_once * load.token))


def trained(load: Load, devices: int) -> float:
    """Seconds of annotation, updates and synchronisation."""
    annotated = len(load.steps[0]) / devices * load.annotation
    ring = load.reduced * 2 * (devices - 1) / devices
    update = load.minibatch / devices * load.trained + load.update + ring
    return annotated + load.updates * update + load.rest + load.synchronised


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_without_stragglers_a_colocated_iteration_is_the_sum_of_its_phases(devices: int) -> None:
    load = replace(EVEN, reduced=0.5)
    run = simulate(load, "colocated", devices, devices)
    assert run.seconds == pytest.approx(5 * (sampled(load, devices) + trained(load, devices)))


@pytest.mark.parametrize(("sampling", "training"), [(2, 4), (4, 2), (8, 8), (2, 1)])
def test_without_stragglers_disaggregated_sides_wait_for_each_other(sampling: int, training: int) -> None:
    run = simulate(EVEN, "disaggregated", sampling, training)
    assert run.seconds == pytest.approx(5 * (sampled(EVEN, sampling) + trained(EVEN, training)))


@pytest.mark.parametrize(("sampling", "training"), [(2, 4), (4, 2), (8, 8), (2, 1)])
def test_without_stragglers_one_step_ahead_takes_as_long_as_its_slower_side(sampling: int, training: int) -> None:
    """The first iteration is sampled alone, the last one trained on alone."""
    play, learn = sampled(EVEN, sampling), trained(EVEN, training)
    run = simulate(EVEN, "ahead", sampling, training)
    assert run.seconds == pytest.approx(play + 4 * max(play, learn) + learn)


def test_episodes_that_end_make_steps_faster_and_room_for_others() -> None:
    """One device with two slots: 10 and 30 tokens, then 20 in the slot that is free after 10."""
    load = replace(EVEN, steps=[[10, 30, 20]], slots=2, prefill=0.0)
    both = load.step + 2 * load.token
    run = simulate(load, "colocated", 1, 1)
    training = 3 * load.annotation + load.updates * (8 * load.trained + load.update) + load.rest + load.synchronised
    assert run.seconds == pytest.approx(30 * both + training)
    alone = simulate(replace(load, steps=[[10, 30]]), "colocated", 1, 1)
    shorter = training - load.annotation
    assert alone.seconds == pytest.approx(10 * both + 20 * (load.step + load.token) + shorter)


def test_finished_episodes_are_annotated_while_others_are_sampled() -> None:
    """One that takes ten times as long hides the annotation of the others."""
    load = replace(EVEN, steps=[[10] * 7 + [1000]], prefill=0.0)
    apart, together = simulate(load, "disaggregated", 8, 1), simulate(load, "colocated", 8, 8)
    longest = 1000 * (load.step + load.token)
    update = load.updates * (8 * load.trained + load.update) + load.rest + load.synchronised
    assert apart.seconds == pytest.approx(longest + load.annotation + update)
    assert together.seconds > longest + load.annotation


steps = st.lists(st.lists(st.integers(min_value=1, max_value=60), min_size=6, max_size=6), min_size=1, max_size=4)
seconds = st.floats(min_value=0.0, max_value=2.0)
loads = st.builds(
    Load,
    steps=steps,
    slots=st.integers(min_value=1, max_value=4),
    prefill=seconds,
    step=st.floats(min_value=0.001, max_value=1.0),
    token=seconds,
    annotation=seconds,
    updates=st.integers(min_value=0, max_value=3),
    minibatch=st.integers(min_value=1, max_value=6),
    trained=seconds,
    update=seconds,
    reduced=seconds,
    synchronised=seconds,
    rest=seconds,
)


@settings(max_examples=60)
@given(loads, st.integers(min_value=1, max_value=6), st.integers(min_value=1, max_value=6))
def test_one_step_ahead_is_never_slower_than_the_same_devices_without(load: Load, sampling: int, training: int) -> None:
    now, ahead = (simulate(load, kind, sampling, training) for kind in ("disaggregated", "ahead"))
    assert ahead.seconds <= now.seconds * (1 + 1e-12)


@settings(max_examples=60)
@given(loads, st.integers(min_value=0, max_value=3))
def test_twice_the_devices_are_never_slower_where_they_need_not_talk(load: Load, power: int) -> None:
    load = replace(load, reduced=0.0)
    few, many = (simulate(load, "colocated", 2**p, 2**p) for p in (power, power + 1))
    assert many.seconds <= few.seconds * (1 + 1e-12)


@settings(max_examples=60)
@given(loads, st.sampled_from(KINDS[:2]), st.integers(min_value=1, max_value=64))
def test_no_number_of_devices_is_faster_than_the_longest_episode_and_the_updates(
    load: Load, kind: str, devices: int
) -> None:
    assert simulate(load, kind, devices, devices).seconds >= shortest(load) * (1 - 1e-12)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(loads, st.sampled_from(KINDS), st.integers(min_value=1, max_value=6), st.integers(min_value=1, max_value=6))
def test_devices_are_never_busier_than_they_can_be(load: Load, kind: str, sampling: int, training: int) -> None:
    run = simulate(load, kind, sampling, training)  # type: ignore[arg-type]
    assert 0 < run.busy <= 1 + 1e-9
    assert run == simulate(load, kind, sampling, training)  # type: ignore[arg-type]


def test_a_thousand_devices_are_simulated_and_the_longest_episode_decides() -> None:
    load = replace(EVEN, steps=spread_steps([100] * 4096, 0.5, 1), slots=16, minibatch=512)
    runs = {count: simulate(load, "colocated", count, count).seconds for count in (1, 32, 1024)}
    assert runs[1] > 20 * runs[32] > 20 * runs[1024]
    longest = max(load.steps[0]) * (load.step + load.token)
    assert longest < runs[1024] < 2 * longest + trained(replace(load, steps=[[100] * 4096]), 512)


def test_the_best_split_is_the_fastest_and_two_devices_are_needed() -> None:
    assert best(EVEN, "ahead", 1) is None
    assert best(EVEN, "colocated", 1) == simulate(EVEN, "colocated", 1, 1)
    found = best(EVEN, "ahead", 8)
    assert found is not None
    assert found.sampling + found.training == 8
    assert found.seconds == min(simulate(EVEN, "ahead", n, 8 - n).seconds for n in (1, 2, 4, 5, 6, 7))


def test_lengths_spread_as_asked_around_the_same_mean() -> None:
    drawn = np.array(spread_steps([200] * 4000, 0.5, 2))
    assert drawn.mean() == pytest.approx(200, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.05)
    assert spread_steps([3, 5], 0.0, 2) == [[3, 5], [3, 5]]
    assert spread_steps([200] * 5, 0.5, 2) == spread_steps([200] * 5, 0.5, 2)
