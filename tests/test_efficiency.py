"""Area under the validation curve and tokens to a threshold, on curves that can be worked out by hand."""

from __future__ import annotations

import pytest
from scipy import stats

from pipeline.analysis.efficiency import Points, area, compared, points, threshold_of, tokens_to


def rows(*validations: float | None, before: float = 0.0, tokens: float = 10.0) -> list[dict[str, float]]:
    found = [{"tokens": tokens} | ({} if value is None else {"validation_success": value}) for value in validations]
    found[0]["validation_success_before"] = before
    return found


def curve(*validations: float | None, **more: float) -> Points:
    found = points(rows(*validations, **more))
    assert found is not None
    return found


def test_validations_stand_at_the_tokens_that_had_been_sampled() -> None:
    found = curve(None, 0.5, None, 1.0, before=0.1)
    assert found.tokens.tolist() == [0.0, 20.0, 40.0]
    assert found.success.tolist() == [0.1, 0.5, 1.0]
    assert points([{"tokens": 10.0}]) is None


def test_an_area_is_a_mean_success_up_to_the_common_end() -> None:
    found = curve(0.5, 1.0)
    assert area(found, 20.0) == pytest.approx((0.25 * 10 + 0.75 * 10) / 20)
    assert area(found, 15.0) == pytest.approx((0.25 * 10 + 0.625 * 5) / 15)
    assert area(curve(0.4, 0.4, before=0.4), 17.0) == pytest.approx(0.4)


def test_tokens_to_a_threshold_lie_on_the_line_between_validations() -> None:
    assert tokens_to(curve(0.5, 1.0), 0.25) == pytest.approx(5.0)
    assert tokens_to(curve(0.5, 0.2, 1.0), 0.5) == pytest.approx(10.0)
    assert tokens_to(curve(0.5, 1.0, before=0.6), 0.5) == 0.0
    assert tokens_to(curve(0.5, 0.6), 0.7) is None


def test_the_threshold_is_half_way_to_the_best_methods_end() -> None:
    mine, theirs = {"0": rows(0.5, 0.9, before=0.1)}, {"0": rows(0.5, 0.5, before=0.3)}
    assert threshold_of([mine, theirs]) == pytest.approx((0.2 + 0.9) / 2)
    assert threshold_of([{"0": rows(0.1, 0.1, before=0.2)}]) is None
    assert threshold_of([{"0": [{"tokens": 10.0}]}]) is None


def test_differences_are_paired_over_seeds() -> None:
    mine = {"0": rows(0.6, 1.0), "1": rows(0.4, 0.8), "2": rows(0.8, 0.9), "7": rows(0.0, 0.0)}
    theirs = {"1": rows(0.2, 0.8), "0": rows(0.2, 0.6), "2": rows(0.3, 0.6)}
    found = compared(mine, theirs, 0.3)
    areas = [area(curve(*a), 20.0) - area(curve(*b), 20.0) for a, b in (((0.6, 1.0), (0.2, 0.6)), ((0.4, 0.8), (0.2, 0.8)), ((0.8, 0.9), (0.3, 0.6)))]  # fmt: skip
    low, high = stats.t.interval(0.95, 2, sum(areas) / 3, stats.sem(areas))
    assert found["auc"]["value"] == pytest.approx(sum(areas) / 3, abs=1e-6)
    assert (found["auc"]["ci_low"], found["auc"]["ci_high"]) == pytest.approx((low, high), abs=1e-6)
    assert found["auc"]["p"] == 0.25  # three seeds on one side
    assert (found["auc"]["seeds"], found["auc"]["tokens"]) == (3, 20.0)
    there = found["tokens_to_threshold"]
    times = [5.0 - 12.5, 7.5 - (10 + 10 / 6), 3.75 - 10.0]
    assert there["value"] == pytest.approx(sum(times) / 3, abs=1e-5)
    assert (there["reached"], there["against_reached"], there["seeds"]) == (3, 3, 3)


def test_where_a_seed_does_not_reach_the_threshold_it_is_counted_and_nothing_compared() -> None:
    mine, theirs = {"0": rows(0.5, 0.9), "1": rows(0.5, 0.9)}, {"0": rows(0.1, 0.2), "1": rows(0.5, 0.9)}
    there = compared(mine, theirs, 0.7)["tokens_to_threshold"]
    assert (there["reached"], there["against_reached"], there["value"], there["p"]) == (2, 1, None, None)
    assert compared(mine, theirs, None)["tokens_to_threshold"] is None
    unknown = {"0": [{"tokens": 10.0}], "1": [{"tokens": 10.0}]}
    assert compared(mine, unknown, 0.7) == {"auc": None, "tokens_to_threshold": None}
