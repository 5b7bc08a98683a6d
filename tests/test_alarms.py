"""Alarms as functions of learning curves: planted curves raise each of them, healthy ones none; then what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.settings.alarms import PREFIX, SAID, Alarms
from pipeline.settings.params import Config, load, parse
from pipeline.settings.presets import overlay
from pipeline.training.alarms import RULES, alarm_text, alarms, raised
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
Curve = list[dict[str, float]]

HEALTHY = {
    "success": 0.35,
    "valid_action_rate": 0.97,
    "cut_rate": 0.01,
    "tokens_per_episode": 40.0,
    "turns_per_episode": 4.0,
    "episodes": 128.0,
    "entropy": 0.4,
    "kl_reference": 0.1,
    "kl_behaviour": 0.02,
    "repetition": 0.02,
    "gradient_norm": 1.0,
    "updates": 8.0,
    "non_finite_losses": 0.0,
    "skipped_steps": 0.0,
    "critic_explained_variance": 0.3,
}
"""A row as those of the default comparison are."""


CONFIG = load(ROOT / "params.yaml")


def configured(**alarms: Any) -> Config:
    """params.yaml, with thresholds changed."""
    train = CONFIG.train.model_copy(update={"alarms": Alarms(**alarms)})
    return CONFIG.model_copy(update={"train": train})


OFF = configured(**dict.fromkeys(RULES))


def curve(*changes: dict[str, Any]) -> Curve:
    """A healthy first iteration, then one for each of the changes; a value of None takes a key away."""
    rows = [HEALTHY | change for change in ({}, *changes)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


PLANTED: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "success": ([{"success": 0.05}, {"success": 0.02}], {"success"}),
    "success after a rise": ([{"success": 0.9}] * 4 + [{"success": 0.15}] * 3, {"success"}),
    "validated success": ([{"validation_success": 0.05}], {"success"}),
    "valid actions": ([{"valid_action_rate": 0.4}], {"valid_actions"}),
    "validated actions": ([{"validation_valid_action_rate": 0.3}], {"valid_actions"}),
    "KL to the reference": ([{"kl_reference": 2.1}], {"kl"}),
    "KL of one update": ([{"kl_update_action": 5.9e6}], {"kl"}),
    "entropy is gone": ([{"entropy": 0.0}], {"entropy"}),
    "entropy has grown": ([{"entropy": 2.1}], {"entropy"}),
    "repetition": ([{"repetition": 0.31}], {"repetition"}),
    "short responses": ([{"tokens_per_episode": 7.0}], {"length"}),
    "long responses": ([{"tokens_per_episode": 210.0}], {"length"}),
    "cut responses": ([{"cut_rate": 0.51}], {"cut"}),
    "no gradient": ([{"gradient_norm": 9e-5}] * 3, {"steps"}),
    "no step": ([{"updates": 0.0, "gradient_norm": None}] * 3, {"steps"}),
    "held back": ([{"skipped_steps": 8.0}] * 3, {"steps"}),
    "not finite": ([{"non_finite_losses": 1.0}], {"skipped"}),
    "sampler": ([{"sampler_difference": 0.21}], {"sampler"}),
    "critic": ([{"critic_explained_variance": -1e8}], {"heads"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_alarmed_of_and_nothing_else_is(name: str) -> None:
    changes, expected = PLANTED[name]
    planted = curve(*changes)
    planted[0]["validation_success_before"] = 0.4
    assert set(alarms(planted, CONFIG)) == expected
    assert {found for _, names in PLANTED.values() for found in names} == set(RULES), "all are planted"


@pytest.mark.parametrize("name", PLANTED)
def test_a_null_switches_an_alarm_off(name: str) -> None:
    changes, (alarm,) = PLANTED[name]
    planted = curve(*changes)
    planted[0]["validation_success_before"] = 0.4
    assert alarms(planted, configured(**{alarm: None})) == {}


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [{"success": 0.05}],
        [{"gradient_norm": 0.0}] * 2,
        [{"gradient_norm": 0.0}] * 2 + [{"gradient_norm": 0.5}],
        [{"critic_explained_variance": -1e8}, {"critic_explained_variance": 0.5}],
        [{"critic_explained_variance": -900.0}],
        [{"sampler_difference": 0.19}],
        [{"repetition": 0.3}],
        [{"tokens_per_episode": 20.0}, {"entropy": 0.02}, {"entropy": 1.9}],
    ],
    ids=["first", "one bad iteration", "two without a gradient", "it came back", "a critic that learnt", "a bad critic",
         "near", "nearly", "changes"],
)  # fmt: skip
def test_what_happens_in_good_trainings_is_no_alarm(changes: list[dict[str, Any]]) -> None:
    assert alarms(curve(*changes), CONFIG) == {}


def test_while_only_a_critic_learns_nothing_has_vanished() -> None:
    warming = [HEALTHY | {"gradient_norm": 0.0} for _ in range(5)]
    assert alarms(warming, CONFIG) == {}
    assert set(alarms([*warming, *curve(*[{"gradient_norm": 0.0}] * 3)], CONFIG)) == {"steps"}


def test_what_could_be_chance_is_no_alarm() -> None:
    """At toy size an iteration has two initial states: that none succeeds says nothing."""
    small = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"groups": 2})})
    unlucky = curve(*[{"success": 0.0, "episodes": 8.0}] * 3)
    assert set(alarms(unlucky, CONFIG)) == {"success"}
    assert alarms(unlucky, small) == {}


def test_one_that_never_succeeded_has_not_collapsed() -> None:
    assert alarms([HEALTHY | {"success": 0.0, "valid_action_rate": 0.0} for _ in range(6)], CONFIG) == {}


NUMBERS = st.floats(0, 1e6)
RATES = st.floats(0, 1)
ROWS = st.fixed_dictionaries(
    {
        "success": RATES, "valid_action_rate": RATES, "cut_rate": RATES, "repetition": RATES, "entropy": NUMBERS,
        "tokens_per_episode": NUMBERS, "turns_per_episode": st.floats(1, 100), "episodes": st.floats(1, 1e4),
        "kl_reference": st.floats(-1e6, 1e6), "updates": st.integers(0, 100).map(float),
    },
    optional={
        "gradient_norm": NUMBERS, "non_finite_losses": st.integers(0, 100).map(float), "sampler_difference": NUMBERS,
        "kl_update_action": NUMBERS, "critic_explained_variance": st.floats(-1e9, 1), "validation_success": RATES,
        "validation_valid_action_rate": RATES, "validation_success_before": RATES,
    },
)  # fmt: skip
CURVES = st.lists(ROWS, min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(CURVES)
def test_every_curve_has_alarms_with_finite_numbers_that_can_be_said(rows: Curve) -> None:
    found = alarms(rows, CONFIG)
    assert set(found) <= set(SAID)
    assert all(np.isfinite(value) for value in found.values())
    told = [*rows[:-1], rows[-1] | {f"{PREFIX}{name}": value for name, value in found.items()}]
    assert raised(told[-1]) == found
    assert alarm_text(told).count("(iteration ") == len(found)
    assert alarms(told, CONFIG) == found, "what has been said of a row decides nothing"
    assert alarms(rows, OFF) == {}


@settings(max_examples=60, deadline=None)
@given(CURVES, st.sampled_from(["kl_reference", "sampler_difference", "repetition", "cut_rate"]))
def test_more_of_what_is_wrong_never_ends_an_alarm(rows: Curve, key: str) -> None:
    """Of the last row; of the first one more would be a reason for more."""
    if len(rows) == 1:
        return
    worse = [*rows[:-1], rows[-1] | {key: rows[-1].get(key, 0.0) * 2 + 0.1}]
    assert set(alarms(rows, CONFIG)) <= set(alarms(worse, CONFIG))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.9), st.integers(1, 12))
def test_chance_alone_raises_no_alarm(seed: int, rate: float, iterations: int) -> None:
    """Eight initial states of unequal difficulty, sixteen episodes of each; a policy that stays as it is."""
    draws = np.random.default_rng(seed)

    def row() -> dict[str, float]:
        states = np.clip(draws.normal(rate, 0.2, 8), 0.02, 0.98)
        success = float(draws.binomial(16, states).mean() / 16)
        noise = {key: HEALTHY[key] * draws.uniform(0.8, 1.02) for key in ("valid_action_rate", "entropy", "repetition")}
        return HEALTHY | noise | {"success": success, "gradient_norm": float(draws.lognormal(0, 1))}

    rows = [row() for _ in range(iterations)]
    assert all(alarms(rows[: end + 1], CONFIG) == {} for end in range(iterations))


def test_a_threshold_that_cannot_be_is_refused_with_its_key() -> None:
    wrong = {"success": 1.0, "kl": 0.0, "entropy": [0.5, 0.9], "length": [0.5], "stepz": 1.0}
    with pytest.raises(UserError) as error:
        parse(overlay(read_yaml(ROOT / "params.yaml"), {"train": {"alarms": wrong}}))
    lines = str(error.value).splitlines()
    assert all(any(f"train.alarms.{name}" in line for line in lines) for name in wrong)


def test_every_alarm_has_a_threshold_words_and_a_line_in_the_documents() -> None:
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    fields = Alarms.model_fields
    assert list(fields) == list(RULES) == list(SAID)
    for name, field in fields.items():
        assert f"| `{name}` | {table_default(field.default)} | " in text


def table_default(default: Any) -> str:
    return " and ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else f"{default:g}"
