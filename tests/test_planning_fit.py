"""Constants of a device: found again where they were planted, and good for what they were not fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.constants import Constants, Timed, constants_of, fitted, larger_left_out, left_out, predicted
from pipeline.planning.devices import SHEETS, measured_device, sheet_device
from pipeline.planning.measuring import Variant, keep, kept_points, measure, seconds_by_name
from pipeline.planning.work import PHASES, Work
from pipeline.report.plan import fit_text
from pipeline.workspace.errors import UserError
from tests.trainings import configured

PLANTED = Constants(1.5e-11, 2e-10, 4e-5, 6e-6)


def made_up(noise: float, seed: int = 0, count: int = 16) -> list[Timed]:
    """Iterations of work of many sizes, each of which some term decides, timed by the planted constants."""
    draws, points = np.random.default_rng(seed), []
    for index in range(count):
        work = {phase: Work(*(float(x) for x in 10 ** draws.uniform((8, 7, 2, 2), (11, 10, 5, 5)))) for phase in PHASES}
        seconds: dict[str, float] = {}
        for phase, own in work.items():
            factor = np.exp(noise * draws.standard_normal())
            name = constants_of(phase)
            seconds[name] = seconds.get(name, 0.0) + PLANTED.seconds(own) * factor
        points.append(Timed(f"point {index}", f"size {index // 4}", work, seconds))
    return points


def test_planted_constants_are_found_again_without_noise() -> None:
    for constants in fitted(made_up(0.0)).values():
        assert tuple(constants) == pytest.approx(tuple(PLANTED), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_with_noise_points_left_out_are_predicted_within_twenty_percent(seed: int) -> None:
    points = made_up(0.05, seed, 24)
    for misses in (left_out(points), larger_left_out(points)):
        assert max(abs(miss.error) for miss in misses) < 0.2
    assert len(left_out(points)) == 24
    assert {miss.point for miss in larger_left_out(points)} == {f"point {n}" for n in range(20, 24)}


def test_a_point_left_out_has_no_part_in_its_own_prediction() -> None:
    points = made_up(0.0)
    spoiled = points[3]._replace(seconds={name: 100 * s for name, s in points[3].seconds.items()})
    miss = left_out([*points[:3], spoiled, *points[4:]])[3]
    assert miss.predicted == pytest.approx(miss.measured / 100, rel=1e-6)
    assert miss.error == pytest.approx(-0.99)


@given(st.integers(min_value=0, max_value=10_000), st.floats(min_value=0.0, max_value=2.0))
def test_no_constant_is_negative_whatever_the_noise(seed: int, noise: float) -> None:
    fit = fitted(made_up(noise, seed, 6))
    assert all(value >= 0 for constants in fit.values() for value in constants)
    assert set(fit) == {constants_of(phase) for phase in PHASES}


def test_a_phase_that_was_never_timed_costs_nothing_and_has_no_constants() -> None:
    points = [point._replace(seconds={"update": point.seconds["update"]}) for point in made_up(0.0)]
    fit = fitted(points)
    assert set(fit) == {"update"}
    seconds = predicted(fit, points[0].work)
    assert seconds["update"] == pytest.approx(points[0].seconds["update"], rel=1e-6)
    assert seconds["decoding"] == 0


def test_every_key_of_a_phase_is_what_trainings_write() -> None:
    spent = {"seconds": 9.0, "tokens": 3.0, **{f"seconds_{key}": 1.0 for keys in PHASES.values() for key in keys}}
    found = seconds_by_name(spent)
    assert found["environment"] == 2  # reset and step
    assert found["bookkeeping"] == 3
    assert found["sampling"] == 1  # prefill and decoding are one stretch of time
    assert found["scoring"] == 3  # annotation, values and update KL
    assert "seconds" not in found


def test_small_iterations_are_timed_counted_kept_and_fitted(tmp_path: Path) -> None:
    variants = (Variant(2, 2, 1, 4), Variant(2, 4, 2, 6))
    points = measure(configured(), {"one": (32, 1, 2), "two": (64, 1, 2)}, variants, repeats=1)
    assert [point.shape for point in points] == ["one", "one", "two", "two"]
    for point in points:
        timed = {"sampling", "environment", "scoring", "update", "gradient shares", "bookkeeping", "synchronising"}
        assert timed == set(point.seconds)
        assert all(seconds >= 0 for seconds in point.seconds.values())
        assert set(point.work) == set(PHASES)
    assert points[1].work["decoding"].tokens > points[0].work["decoding"].tokens
    assert points[2].work["update"].flops > 2 * points[0].work["update"].flops
    target = tmp_path / "points.json"
    keep(points, target)
    assert kept_points(target) == points
    fit = fitted(points)
    assert {"sampling", "scoring", "update"} <= set(fit)
    text = fit_text("here", left_out(points), larger_left_out(points))
    assert len(text.splitlines()) == 2 + len(points)
    assert " of 4 within 20% (median " in text


def test_a_data_sheet_is_slower_in_float32_and_faster_with_more_memory_bandwidth() -> None:
    work = {"annotation": Work(flops=1e15), "decoding": Work(bytes=1e12)}
    half, single = (predicted(sheet_device("H100", dtype).fit, work) for dtype in (torch.bfloat16, torch.float32))
    assert single["annotation"] / half["annotation"] == pytest.approx(989.5 / 67)
    newer = predicted(sheet_device("H200", torch.bfloat16).fit, work)
    assert newer["annotation"] == half["annotation"]
    assert half["decoding"] / newer["decoding"] == pytest.approx(4.8 / 3.35)
    assert all(sheet.single < sheet.half for sheet in SHEETS.values())


def test_float16_policies_are_updated_in_float32() -> None:
    work = {"annotation": Work(flops=1e15), "update": Work(flops=1e15)}
    of = {dtype: predicted(sheet_device("A100-80", dtype).fit, work) for dtype in (torch.float16, torch.bfloat16)}
    assert of[torch.float16]["annotation"] == of[torch.bfloat16]["annotation"]
    assert of[torch.float16]["update"] == pytest.approx(of[torch.bfloat16]["update"] * 312 / 19.5)


def test_an_unknown_device_is_one_line_that_names_all_that_are_known() -> None:
    with pytest.raises(UserError) as error:
        sheet_device("H1000", torch.float32)
    assert str(error.value) == f"--device: 'H1000' is not known; allowed: {', '.join(SHEETS)}"


def test_a_measured_device_says_so() -> None:
    device = measured_device("here", 1e9, {"update": PLANTED})
    assert device.measured
    assert not sheet_device("H100", torch.float32).measured
