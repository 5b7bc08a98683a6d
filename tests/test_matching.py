"""Learning rates that are found: the search, short trainings at toy size, and what params.yaml may say of it."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import signal
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.model.loading import load_trained
from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay
from pipeline.sources.fingerprints import of_row
from pipeline.tracking.store import resolved_params
from pipeline.training.matching import (
    CLOSE,
    LARGEST_STEP,
    SEEDS,
    TRIES,
    Match,
    matched,
    matching_seeds,
    mean_kl,
    nearest,
    search,
    shortened,
    with_rate,
)
from pipeline.training.module import PolicyGradient
from pipeline.training.seed_key import training_key
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Cache, Layout
from pipeline.workspace.yaml_files import read_yaml
from tests.config_cases import ROOT, put
from tests.trainings import LAKE, configured, fit

# ----------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("power", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("start", [1e-5, 3e-3, 0.3])
def test_the_search_finds_the_rate_of_a_kl_that_goes_with_a_power_of_it(power: float, start: float) -> None:
    tried: list[float] = []

    def moved(rate: float) -> float:
        tried.append(rate)
        return float(40 * rate**power)

    wanted = float(40 * 0.002**power)
    found = search(moved, wanted, start)
    assert [match.rate for match in found] == tried
    assert tried[0] == start
    assert len(tried) <= TRIES
    assert nearest(found, wanted).off(wanted) < CLOSE
    assert nearest(found, wanted).rate == pytest.approx(0.002, rel=CLOSE)
    assert all(1 / 8.1 < after / before < LARGEST_STEP * 1.01 for before, after in itertools.pairwise(tried))


def test_the_search_ends_within_its_tries_where_measurements_scatter() -> None:
    """By up to a tenth; in four of five searches a try is close."""
    ends = []
    for seed in range(40):
        draws = np.random.default_rng(seed)
        found = search(lambda rate, draws=draws: 40 * rate**2 * draws.uniform(0.9, 1.1), 1.6e-4, 5e-4)
        assert len(found) <= TRIES
        ends.append(nearest(found, 1.6e-4).off(1.6e-4) < CLOSE)
    assert sum(ends) >= 32


def test_a_search_that_does_not_come_close_gives_the_nearest_that_it_has_measured() -> None:
    """The KL stays too low whatever the rate; a rate that nobody tried would be a claim without a measurement."""
    measured = iter([0.01, 0.0139, 0.012, 0.0134, 0.011, 0.0125])
    tried = search(lambda rate: next(measured), 0.04, 1e-3)
    assert len(tried) == TRIES
    found = nearest(tried, 0.04)
    assert found == Match(tried[1].rate, 0.0139)
    assert found.off(0.04) > CLOSE


def test_a_policy_that_does_not_move_is_no_reason_to_leave_the_rates_that_are_allowed() -> None:
    tried = search(lambda rate: 0.0, 0.04, 0.5)
    assert [match.rate for match in tried] == [0.5, 1.0]


def test_rates_at_which_a_policy_falls_apart_bound_the_search_and_are_never_found() -> None:
    """The wanted KL lies beyond the last rate that holds: the search closes in on it from both sides."""
    tried = search(lambda rate: 40 * rate**2 if rate < 3e-3 else math.inf, 40 * 0.02**2, 1e-3)
    assert len(tried) == TRIES
    broken, whole = ([m.rate for m in tried if math.isinf(m.kl) == side] for side in (True, False))
    assert max(whole) < 3e-3 <= min(broken)
    assert nearest(tried, 40 * 0.02**2).rate == max(whole) > 2.5e-3


def test_a_policy_that_fell_apart_has_moved_too_far_whatever_was_measured() -> None:
    whole = [{"kl_update_action": 0.25}, {"kl_update_action": 0.75}]
    assert mean_kl([whole, [{"kl_update_action": 0.5}]]) == 0.5
    assert mean_kl([whole, [{"kl_update_action": 0.5, "alarm_valid_actions": 0.1}]]) == math.inf
    assert mean_kl([[{"success": 0.5}]]) == 0.0


def test_a_search_that_begins_where_policies_fall_apart_comes_down() -> None:
    tried = search(lambda rate: 40 * rate**2 if rate < 1e-3 else math.inf, 40 * 5e-4**2, 0.3)
    assert nearest(tried, 40 * 5e-4**2).off(40 * 5e-4**2) < CLOSE


# -------------------------------------------------------------------------------------------------------- real trainings

ROWS: dict[str, Any] = {
    "seeds": [0, 1],
    "train": {"iterations": 5, "validate_every": 2},
    "method_defaults": {"learning_rate": 1e-3},
    "methods": {"grpo_actfocus": {"learning_rate": 2e-3}},
}


def search_at(folder: Path, policy: Path, config: Config) -> dict[str, Any]:
    """What a search in a project's folder finds."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    if not (folder / "models" / "policy").exists():
        (folder / "models" / "policy").symlink_to(policy)
    with chdir(folder):
        return matched(config, LAKE, "grpo_matched", Layout(Path(".")))[1]


@pytest.fixture
def untabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No annotated table: a training samples its first iteration itself, and it is the same one."""
    monkeypatch.setattr("pipeline.training.matching.Layout.annotated", lambda *_: None)


@pytest.mark.usefixtures("untabled")
def test_the_rate_found_moves_action_tokens_as_far_as_the_other_method_in_whole_trainings(
    directory: Path, tmp_path: Path
) -> None:
    config = configured(ROWS)
    found = search_at(tmp_path, directory, config)
    assert (found["matched_to"], found["seeds"]) == ("grpo_actfocus", [0, 1])
    assert found["off"] < CLOSE
    assert found["off"] == pytest.approx(abs(found["found"] / found["wanted"] - 1), abs=1e-5)
    assert {"learning_rate": found["learning_rate"], "kl_update_action": found["found"]} in found["tries"]
    assert found["tries"][0]["learning_rate"] == 1e-3
    whole = with_rate(config, "grpo_matched", found["learning_rate"])
    for method, measured in {"grpo_matched": found["found"], "grpo_actfocus": found["wanted"]}.items():
        curves = [
            fit(PolicyGradient(whole, LAKE, method, seed, load_trained(directory, config)), 3).curve for seed in (0, 1)
        ]
        again = np.mean([row["kl_update_action"] for curve in curves for row in curve])
        assert measured == pytest.approx(again, rel=1e-4), "as in whole trainings"


@pytest.mark.usefixtures("untabled")
def test_killed_in_the_middle_a_search_finds_the_same_and_what_it_was_matched_to_is_trained_once(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.matching.TRIES", 2)
    config = configured({**ROWS, "seeds": [0]})
    straight = search_at(tmp_path / "straight", directory, config)
    trained = 1 + len(straight["tries"])
    killed = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=search_at, args=(killed, directory, config))
    process.start()
    results = killed / Cache().matching / "train"
    while process.is_alive() and not list(results.glob("*/result")):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    first = {path: path.stat().st_mtime_ns for path in results.glob("*/result/curves.json")}
    assert 1 <= len(first) < trained
    assert search_at(killed, directory, config) == straight
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len(list(results.glob("*/result"))) == trained
    assert not list(results.glob("*/result/policy"))
    row = {"methods": {"grpo_matched": {"aggregation": {"kind": "token_mean"}}}}
    other = search_at(killed, directory, configured(overlay({**ROWS, "seeds": [0]}, row)))
    assert other["wanted"] == straight["wanted"]
    assert len(list(results.glob("*/result"))) == trained + len(other["tries"]), "the other row's own trainings"


def test_short_trainings_are_the_beginning_of_whole_ones() -> None:
    critic = {"kind": "trunk", "learning_rate": 1e-3, "warmup_iterations": 4}
    rows = {"warm": {"advantage": {"kind": "gae", "critic": critic}}}
    config = configured({"train": {"iterations": 30, "tokens": 9999, "schedule": "linear"}, "methods": rows})
    assert [shortened(config, name).train.iterations for name in ("grpo", "warm")] == [3, 7]
    short = shortened(config, "grpo")
    assert (short.train.schedule, short.train.tokens) == ("constant", None)
    assert short.methods == config.methods


def test_a_search_takes_the_first_six_seeds() -> None:
    assert matching_seeds(configured({"seeds": [4, 2]})) == [4, 2]
    assert matching_seeds(configured({"seeds": list(range(3, 30))})) == list(range(3, 9))
    until = {"from": 5, "at_least": 6, "at_most": 30, "until": "decided"}
    assert matching_seeds(configured({"seeds": until})) == list(range(5, 11))
    assert SEEDS == 6


# -------------------------------------------------------------------------------------------------------------- the rows


@pytest.fixture
def raw() -> dict[str, Any]:
    return copy.deepcopy(read_yaml(ROOT / "params.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "methods.grpo_matched.learning_rate",
            1e-3,
            "methods.grpo_matched.learning_rate: found by matching it to grpo_actfocus; leave one of the two out",
        ),
        (
            "methods.grpo_matched.matched_to",
            "grpo_actfocos",
            "methods.grpo_matched.matched_to: unknown method 'grpo_actfocos'; did you mean 'grpo_actfocus'?",
        ),
        (
            "methods.grpo_matched.matched_to",
            "grpo_matched",
            "methods.grpo_matched.matched_to: grpo_matched is matched to itself; name another method",
        ),
        (
            "methods.grpo_matched.matched_to",
            "ppo_matched",
            "methods.grpo_matched.matched_to: ppo_matched is matched itself; name the method that it is matched to",
        ),
        (
            "methods.grpo_matched.matched_to",
            "grpo",
            "methods.grpo_matched.matched_to: grpo has the same slots, so that there is nothing to match; change one of them",
        ),
        ("method_defaults.matched_to", "grpo", "method_defaults.matched_to: of single methods only"),
    ],
)
def test_what_a_matched_row_may_not_say(raw: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(put(raw, key, value))
    assert str(error.value) == f"params.yaml: {said}"


def test_a_matched_row_is_read_again_as_it_was_written(raw: dict[str, Any]) -> None:
    config = parse(raw)
    assert config.methods["grpo_matched"].learning_rate == config.method_defaults.learning_rate
    found = with_rate(config, "grpo_matched", 8e-4)
    for written in (config, found):
        again = parse(YAML(typ="safe", pure=True).load(resolved_params(written)))
        assert again.methods == written.methods


def test_a_matched_row_is_trained_by_its_stage_alone(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "policy").write_text("weights")
    config = parse(raw)
    with pytest.raises(UserError, match=r"^methods\.grpo_matched: only its train stage trains it"):
        training_key(config, LAKE, "grpo_matched", 0, tmp_path)
    rates = {
        training_key(with_rate(config, name, rate), LAKE, name, 0, tmp_path)
        for name, rate in (("grpo_matched", 5e-4), ("grpo", 5e-4), ("grpo_matched", 6e-4))
    }
    assert len(rates) == 2, "found or written, a rate is the same training"


def test_the_sources_of_a_matched_row_are_those_of_what_it_is_matched_to_as_well(raw: dict[str, Any]) -> None:
    def row(changes: dict[str, Any], name: str = "grpo_matched") -> dict[str, Any]:
        return of_row(parse(overlay(raw, {"methods": changes})), name)

    before = row({})
    assert row({"ppo_actfocus": {"weight": {"reasoning_downweight": 0.2}}}) == before
    assert row({"grpo": {"learning_rate": 1e-4}}) == before
    assert row({"grpo_actfocus": {"source": "a paper"}}) == before
    for change in ({"weight": {"reasoning_downweight": 0.2}}, {"learning_rate": 1e-4}):
        assert row({"grpo_actfocus": change}) != before
    assert row({"grpo_actfocus": {"weight": {"reasoning_downweight": 0.2}}}, "grpo") == row({}, "grpo")
