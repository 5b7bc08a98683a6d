"""Seeds until it is decided: levels that keep the error, decisions that data alone make, and when they stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from pipeline.analysis.looks import Look, levels, look_entry, looks_of, next_count, spent
from pipeline.analysis.looks_simulation import RULES, SPREADS, simulate_looks
from pipeline.settings.params import Config, parse
from pipeline.settings.seeds import SeedsUntil
from pipeline.sources.seeds_in_effect import in_effect
from pipeline.workspace.errors import UserError
from tests.comparison_cases import configuration
from tests.looks_cases import UNTIL, planted

RULE = SeedsUntil.model_validate(UNTIL)
USED = next(name for name in RULES if name.endswith("(used)"))
RUNS = range(20)


def two_methods(**compare: Any) -> Config:
    pair = {"uniform": {"grpo_actfocus": "grpo"}, "control": {}}
    config = configuration(seeds=UNTIL, compare={**pair, **compare})
    methods = {name: config.methods[name] for name in ("grpo", "grpo_actfocus")}
    changed: Config = config.model_copy(update={"methods": methods})
    return changed


def seen(config: Config, differences: dict[str, float], run: int) -> list[Look]:
    """The looks that are taken in one run, as they are however many seeds are in effect beyond the last of them."""
    config = in_effect(config, RULE.at_most)
    return looks_of(config, planted(config, differences, run))


def verdict(look: Look) -> str | None:
    (difference,) = look.differences.values()
    return difference.verdict


# ------------------------------------------------------------------------------------------------------------- levels


def test_one_look_is_an_ordinary_test() -> None:
    assert levels((20,), 0.05) == pytest.approx([0.05])
    assert levels((20,), 0.05, 4) == pytest.approx([0.05])


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_two_looks_spend_what_the_function_says(power: float) -> None:
    counts = (20, 50)
    used = spent(counts, 0.05, power)
    first, second = levels(counts, 0.05, power=power)
    assert first == pytest.approx(used[0])
    bounds = np.array([scipy.stats.norm.isf(level / 2) for level in (first, second)])
    correlation = np.sqrt(20 / 50)
    both = scipy.stats.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
    assert 1 - both.cdf(bounds, lower_limit=-bounds) == pytest.approx(used[1], abs=1e-5)
    assert used[1] == pytest.approx(0.05)


def test_seven_looks_cross_in_five_percent_of_random_walks() -> None:
    counts = np.array(RULE.counts)
    walks = np.random.default_rng(0).standard_normal((100_000, 30)).cumsum(axis=1)[:, counts - 1] / np.sqrt(counts)
    p = 2 * scipy.stats.norm.sf(np.abs(walks))
    crossed = (p < np.array(levels(RULE.counts, 0.05))).any(axis=1).mean()
    assert crossed == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 100_000))
    assert (p < 0.05).any(axis=1).mean() > 0.15, "looking without paying"


def test_a_look_that_cannot_reject_spends_nothing_and_leaves_it_to_the_next() -> None:
    """Six sign flips have no p below 0.031."""
    first, second, *_ = levels(RULE.counts, 0.05)
    assert first == 0
    assert second == pytest.approx(spent(RULE.counts, 0.05)[1])
    assert levels((12, *RULE.counts[2:]), 0.05)[0] > 0


def test_a_family_is_adjusted_at_a_level_that_holds_for_each_of_its_members() -> None:
    alone, four = (levels((20, 30, 40), 0.05, family) for family in (1, 4))
    assert all(0 < shared <= own + 1e-12 for own, shared in zip(alone, four, strict=True))
    for level, share in zip(four, levels((20, 30, 40), 0.05 / 4), strict=True):
        assert level / 4 == pytest.approx(share)


# ---------------------------------------------------------------------------------------------------------- decisions


def test_a_planted_difference_is_found_before_the_last_seed_in_twenty_of_twenty_runs() -> None:
    ends = [seen(two_methods(), {"grpo_actfocus": 0.15}, run)[-1] for run in RUNS]
    assert [verdict(look) for look in ends] == ["better"] * len(RUNS)
    counts = [len(look.seeds) for look in ends]
    assert max(counts) < 30
    assert np.mean(counts) < 15


def test_without_a_difference_twenty_of_twenty_runs_end_and_few_are_wrong() -> None:
    """Of twenty tests at 5 % three are wrong at most, in 98 % of repetitions; a thousand runs say below what the error is."""
    ends = [seen(two_methods(), {}, run)[-1] for run in RUNS]
    words = [verdict(look) for look in ends]
    assert sum(word in ("better", "worse") for word in words) <= scipy.stats.binom.ppf(0.98, len(RUNS), 0.05)
    assert words.count("equivalent") > len(RUNS) / 2
    for look, word in zip(ends, words, strict=True):
        assert look.decided == (word != "undecided")
        assert look.decided or len(look.seeds) == 30


def test_the_error_is_kept_over_a_thousand_runs() -> None:
    """With its Monte-Carlo error, three standard ones; two rules, so that the test is known to be able to fail."""
    few = {name: RULES[name] for name in ("every look at 5 %", USED)}
    rows = simulate_looks(RULE, effects=(0.0,), spreads=SPREADS[:1], trials=1000, rules=few)
    wrong = {row["rule"]: row["wrong"] for row in rows}
    most = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    assert wrong[USED] <= most < wrong["every look at 5 %"]


@pytest.mark.parametrize(("run", "difference"), [(0, 0.15), (1, 0.07)])
def test_killed_and_started_again_the_same_looks_are_taken(run: int, difference: float) -> None:
    """Looks depend on the scores of their own seeds alone, however many others there are by then."""
    config, last = two_methods(), look_entry(RULE, seen(two_methods(), {"grpo_actfocus": difference}, run))
    for number, count in enumerate(RULE.counts[: last["number"]], start=1):
        config = in_effect(config, count)
        looks = looks_of(config, planted(config, {"grpo_actfocus": difference}, run))
        assert look_entry(RULE, looks)["looks"] == last["looks"][:number]
        following = RULE.counts[number] if number < last["number"] else last["seeds"]
        assert next_count(RULE, looks) == following


def test_a_verdict_stays_while_others_are_awaited() -> None:
    """The first method is far better; the primary one differs by too little to be told soon, and is awaited."""
    raw = {"uniform": {"grpo_actfocus": "grpo", "grpo_lr_matched": "grpo"}, "control": {}}
    config = configuration(seeds=UNTIL, compare={**raw, "primary": "grpo_lr_matched"})
    looks = seen(config, {"grpo_actfocus": 0.3, "grpo_lr_matched": 0.035}, 3)
    easy = next(one for one in looks[0].differences if one.method == "grpo_actfocus")
    assert len(looks) > 3
    assert looks[0].differences[easy].verdict is None
    assert [look.differences[easy].verdict for look in looks[1:]] == ["better"] * (len(looks) - 1)
    assert {look.decided_at[easy] for look in looks[1:]} == {10}
    assert not any(look.decided for look in looks[:-1])


def test_a_verdict_is_not_judged_again() -> None:
    """Seeds of the later batches say the opposite: what was decided with the first ones stays, for those who waited."""
    raw = {"uniform": {"grpo_actfocus": "grpo", "grpo_lr_matched": "grpo"}, "control": {}}
    config = in_effect(configuration(seeds=UNTIL, compare={**raw, "primary": "grpo_lr_matched"}), 30)
    scores = planted(config, {"grpo_actfocus": 0.3, "grpo_lr_matched": 0.035}, 3)
    turned = scores["lake", "grpo_actfocus"]
    turned.success[10:] = 0.0
    looks = looks_of(config, scores)
    easy = next(one for one in looks[0].differences if one.method == "grpo_actfocus")
    assert len(looks[-1].seeds) > 14
    assert looks[-1].differences[easy].value < 0
    assert looks[-1].differences[easy].verdict == "better"


def test_an_excluded_training_is_in_no_look() -> None:
    out = {"environment": "lake", "method": "grpo", "seed": 3, "reason": "the disk was full"}
    (difference,) = seen(two_methods(exclusions=[out]), {"grpo_actfocus": 0.15}, 0)[0].differences.values()
    assert len(difference.by_seed) == 5


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"at_lest": 3}, "seeds.at_lest: unknown key; did you mean 'at_least'?"),
        ({"first": 3}, "seeds.first: unknown key; allowed: at_least, at_most, batch, from, until"),
        ({"at_least": 1}, "seeds.at_least: input should be greater than or equal to 2, got 1"),
        ({"at_least": 31}, "seeds: at_least (31) exceeds at_most (30)"),
        ({"until": "sure"}, "seeds.until: 'sure' is not allowed; allowed: 'decided'"),
        ({"from": 2**32 - 2}, "seeds: from (4294967294) + at_most (30) exceeds 4294967296"),
        ({"at_most": 900, "batch": 1}, "seeds: 895 looks; at most 50: raise batch or at_least"),
    ],
)
def test_a_wrong_rule_is_told_by_the_key_as_it_is_written(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        configuration(seeds={**UNTIL, **changes})
    assert str(error.value).startswith(f"params.yaml: {line}")
    assert "\n" not in str(error.value)


def test_a_configuration_with_a_rule_survives_a_round_trip() -> None:
    config = configuration(seeds=UNTIL)
    assert config.seeds == [0, 1, 2, 3, 4, 5]
    for one in (config, in_effect(config, 14)):
        assert parse(one.model_dump(mode="json")) == one
    with pytest.raises(Exception, match="are not the first ones of seeds_until"):
        configuration(seeds=[3, 4], seeds_until=UNTIL)
