"""What a trial is judged by, against slow arithmetic by hand."""

from __future__ import annotations

import pytest

from pipeline.settings.sweep import Constraints
from pipeline.sweep.trial import success, tokens, validation, violations


def curve(before: float, after: dict[int, float], iterations: int, **last: float) -> list[dict[str, float]]:
    """Rows of a training that was validated before the first and after some iterations."""
    rows: list[dict[str, float]] = [{"iteration": float(i), "success": 0.9} for i in range(iterations)]
    rows[0]["validation_success_before"] = before
    for done, value in after.items():
        rows[done - 1]["validation_success"] = value
    rows[-1] |= last
    return rows


CURVES = {
    100: curve(0.2, {4: 0.4, 8: 0.6, 10: 0.3}, 10, kl_reference=0.2, tokens_per_episode=30.0),
    101: curve(0.4, {4: 0.5, 8: 0.7, 10: 0.8}, 10, kl_reference=0.6, tokens_per_episode=50.0),
}


def test_validations_stand_at_the_iterations_done_and_the_one_before_training_at_none() -> None:
    assert validation(CURVES[100]) == [(0, 0.2), (4, 0.4), (8, 0.6), (10, 0.3)]
    assert validation(CURVES[100][:6]) == [(0, 0.2), (4, 0.4)]


def test_final_is_the_last_validation_and_area_the_mean_over_training() -> None:
    assert success(CURVES, "final") == pytest.approx((0.3 + 0.8) / 2)
    first = (4 * (0.2 + 0.4) / 2 + 4 * (0.4 + 0.6) / 2 + 2 * (0.6 + 0.3) / 2) / 10
    second = (4 * (0.4 + 0.5) / 2 + 4 * (0.5 + 0.7) / 2 + 2 * (0.7 + 0.8) / 2) / 10
    assert success(CURVES, "area") == pytest.approx((first + second) / 2)
    assert success({0: curve(0.5, {4: 0.5, 10: 0.5}, 10)}, "area") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.7], 0.7),
        ([0.0, 1.0], 0.5),
        ([0.0, 0.3, 0.9], 0.4),
        ([0.9, 0.0, 0.4, 0.2], 0.375),
        ([0.0, 0.1, 0.2, 0.3, 1.0], 0.32),
    ],
)
def test_a_score_is_the_mean_over_all_seeds(scores: list[float], expected: float) -> None:
    assert success({s: curve(0.0, {3: value}, 3) for s, value in enumerate(scores)}, "final") == pytest.approx(expected)


def test_tokens_are_the_mean_over_seeds_at_the_end() -> None:
    assert tokens(CURVES) == pytest.approx(40.0)


def test_a_broken_constraint_is_positive_and_a_kept_one_is_not() -> None:
    found = violations(CURVES, Constraints(kl=0.3, loss=0.05))
    assert found == {"kl": pytest.approx(0.1), "loss": pytest.approx(-0.1 - 0.05)}
    fallen = {**CURVES, 102: curve(0.5, {10: 0.2}, 10, kl_reference=0.1)}
    found = violations(fallen, Constraints(kl=0.3, loss=0.25))
    assert found == {"kl": pytest.approx(0.0), "loss": pytest.approx(0.05)}, "any seed's loss counts, KL's mean does"
    assert violations(CURVES, Constraints(kl=None, loss=None)) == {}
