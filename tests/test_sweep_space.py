"""From ranges in params.yaml to draws and back, from draws to a params file, and what a mistake looks like."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay
from pipeline.settings.sweep import Choice, Integer, Logarithmic, LogarithmicFromZero, Space, Uniform
from pipeline.sweep.plan import plans
from pipeline.sweep.space import changes, configured, current, from_value, to_value
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.batches import properties
from tests.searches import ALPHA, BETA, ROOT, TAU, params, searches

PRESETS = sorted(path.parent.name for path in (ROOT / "presets").glob("*/overlay.yaml"))
GAE = {"kind": "gae", "gamma": 1.0, "lam": 1.0, "whiten": True, "critic": {"kind": "trunk", "learning_rate": 1e-3}}
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
positive = st.floats(1e-9, 1e6)


@st.composite
def settings_of_spaces(draw: st.DrawFn) -> tuple[Space, Any]:
    """A space of any kind, and a setting in it."""
    kind = draw(st.sampled_from([Uniform, Logarithmic, LogarithmicFromZero, Integer, Choice]))
    if kind is Choice:
        values = draw(st.lists(st.text() | st.integers(2), min_size=2, unique=True))
        return Choice(kind="choice", values=values), draw(st.sampled_from(values))
    if kind is LogarithmicFromZero:
        high = draw(positive)
        zero = LogarithmicFromZero(kind="log_from_zero", high=high, scale=draw(positive))
        return zero, draw(st.floats(0.0, high))
    ends = {Uniform: numbers, Logarithmic: positive, Integer: st.integers(-1000, 1000)}[kind]
    low, high = sorted((draw(ends), draw(ends)))
    assume(low < high)
    between = st.integers(int(low), int(high)) if kind is Integer else st.floats(low, high)
    return kind(kind={Uniform: "uniform", Logarithmic: "log", Integer: "integer"}[kind], low=low, high=high), draw(
        between
    )


@properties
@given(settings_of_spaces())
def test_a_setting_survives_being_made_a_draw_and_back(given: tuple[Space, Any]) -> None:
    space, value = given
    found = to_value(space, from_value(space, value))
    if isinstance(value, float):
        low = 0.0 if isinstance(space, LogarithmicFromZero) else space.low
        # Around zero it is the draw, a number in [0, 1], that is as exact as a float can be.
        exact = 1e-14 * space.scale if isinstance(space, LogarithmicFromZero) else 0.0
        assert found == pytest.approx(value, rel=5.1e-6, abs=exact)
        assert low <= found <= space.high
    else:
        assert found == value
    assert type(found) is type(value)


@properties
@given(positive, positive, st.lists(st.floats(0.0, 1.0), min_size=2))
def test_numbers_from_zero_are_linear_below_the_scale_and_logarithmic_above(
    high: float, scale: float, draws: list[float]
) -> None:
    space = LogarithmicFromZero(kind="log_from_zero", high=high, scale=scale)
    assert to_value(space, 0.0) == 0.0
    assert to_value(space, 1.0) == pytest.approx(high, rel=1e-5)
    # scale * (sqrt(1 + high / scale) - 1), written so that nothing cancels.
    assert to_value(space, 0.5) == pytest.approx(high / (math.sqrt(1.0 + high / scale) + 1.0), rel=2e-5)
    found = [to_value(space, drawn) for drawn in sorted(draws)]
    assert found == sorted(found)
    assert 0.0 <= found[0] <= found[-1] <= high


# ------------------------------------------------------------------------------------------------------ to a params file


def raw_params(**changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = overlay(read_yaml(ROOT / "params.yaml"), changed)
    return found


def test_a_slot_of_the_methods_own_is_changed_and_an_inherited_one_is_written_whole() -> None:
    raw = raw_params(method_defaults={"advantage": GAE}, methods={"mine": {"learning_rate": 1e-3}})
    before = copy.deepcopy(raw)
    assert changes(raw, "grpo_actfocus", {ALPHA: 0.3, "method.learning_rate": 1e-3}) == {
        "methods": {"grpo_actfocus": {"weight": {"reasoning_downweight": 0.3}, "learning_rate": 1e-3}}
    }
    found = changes(raw, "mine", {"method.regulariser.kl": 0.3, "method.advantage.critic.learning_rate": 0.01})
    regulariser = {**raw["method_defaults"]["regulariser"], "kl": 0.3}
    advantage = {**GAE, "critic": {"kind": "trunk", "learning_rate": 0.01}}
    assert found == {"methods": {"mine": {"regulariser": regulariser, "advantage": advantage}}}
    found = changes(raw, "mine", {"train.passes": 2, "rollout.temperature": 0.7, "train.gradient_clip": 0.5})
    assert found == {"train": {"passes": 2, "gradient_clip": 0.5}, "rollout": {"temperature": 0.7}}
    assert raw == before


@pytest.mark.parametrize("method", ["ppo_actfocus", "grpo_actfocus", "grpo"])
def test_only_what_is_searched_differs_from_params(method: str) -> None:
    raw = raw_params()
    values: dict[str, Any] = {"method.regulariser.kl": 0.25, "method.learning_rate": 2.5e-5, "train.minibatch": 16}
    if method != "grpo":
        values |= {ALPHA: 0.0123457, BETA: 1e-05, TAU: 9.87654}
    before, after = parse(raw), configured(raw, method, values, "here")
    assert {key: current(after, method, key) for key in values} == values
    for name in before.methods:
        assert name == method or after.methods[name] == before.methods[name]
    for section in set(Config.model_fields) - {"methods", "train"}:
        assert getattr(after, section) == getattr(before, section)
    old = configured(raw, method, {key: current(before, method, key) for key in values}, "here")
    assert old == before


# --------------------------------------------------------------------------------------------------------------- mistakes


def study(**changed: Any) -> dict[str, Any]:
    """The study of ActFocus with changes; null leaves a part out."""
    return {"studies": {"actfocus": changed}}


CRITIC = {"method.advantage.critic.learning_rate": {"kind": "log", "low": 1e-4, "high": 1e-2}}
LOST = dict.fromkeys(("uniform", "paper"))
MISTAKES: list[tuple[dict[str, Any], str]] = [
    (study(methods=["gpro"]), r"sweep.studies.actfocus.methods: 'gpro' is not there; allowed: ppo, grpo, "),
    (
        study(methods=["grpo_matched"]),
        r"methods: grpo_matched is matched to grpo_actfocus, so that there is nothing to se",
    ),
    (
        study(methods=["grpo"]),
        r"sweep.studies.actfocus.space: method.weight.reasoning_downweight: .*no setting of grpo",
    ),
    (study(environment="chess"), r"sweep.studies.actfocus.environment: 'chess' is not there; allowed: frozen_lake"),
    (study(space=CRITIC), r"sweep.studies.actfocus.space: method.advantage.critic.*'critic' is no setting of"),
    (
        study(space={"train": {"kind": "log", "low": 1, "high": 2}}),
        r"space: train: cannot be searched; allowed: keys of",
    ),
    (study(space={"method.weight": {"kind": "log", "low": 1, "high": 2}}), r"space: method.weight: a section, not a "),
    (
        study(space={"evaluation.states": {"kind": "integer", "low": 1, "high": 2}}),
        r"space: evaluation.states: cannot be searched; allowed: keys of method, train, rollout$",
    ),
    (study(baselines={"paper": {TAU: 20.0}}), rf"baselines.paper.{TAU}: grpo_actfocus: 20.0 is not in \[0.1, 10\]$"),
    (
        study(baselines={"mine": {"method.learning_rate": 1e-3}}),
        r"baselines.mine: 'method.learning_rate' is not searched; allowed: method.weight.reasoning_downweight, ",
    ),
    (
        study(space={TAU: {"low": 20.0, "high": 30.0}}, baselines={**LOST, "mine": {TAU: 25.0}, "params": {}}),
        rf"baselines.params.{TAU}: grpo_actfocus: 1.0 is not in \[20, 30\]$",
    ),
    (
        study(space={"train.passes": {"kind": "integer", "low": 0, "high": 2}}),
        r"sweep.studies.actfocus.space.train.passes from baseline uniform: .*train.passes",
    ),
    (
        study(
            space={"train.passes": {"kind": "integer", "low": 1, "high": 3}}, baselines={"mine": {"train.passes": 1.5}}
        ),
        r"baselines.mine.train.passes: grpo_actfocus: 1.5 is not a whole number$",
    ),
    (
        study(space={BETA: {"low": -2.0}}),
        rf"space.{re.escape(BETA)} from baseline uniform: .*redistribution_strength",
    ),
    ({"seeds": [3, 100]}, r"sweep: \[3\] are seeds of the comparison; a sweep needs seeds of its own$"),
    ({"confirm_seeds": [0, 200]}, r"sweep: \[0\] are seeds of the comparison; a sweep needs seeds of its own$"),
    ({"seeds": [100, 200]}, r"sweep: .*confirm_seeds must be fresh, \[200\] are among seeds too"),
    ({"fewer_tokens": True}, r"sweep: .*fewer_tokens has two objectives, which no pruner can rank"),
    (study(space={TAU: {"low": 20.0}}), r"sweep.studies.actfocus.space.*low \(20\) must be below high \(10\)"),
]


@pytest.mark.parametrize(("sweep", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_found_before_anything_runs_and_is_one_line(
    tmp_path: Path, sweep: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        searches(tmp_path, "actfocus", **sweep)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{tmp_path / 'params.yaml'}: ")
    assert re.search(message, text), text


def test_trials_with_a_budget_of_tokens_are_not_pruned_by_iterations(tmp_path: Path) -> None:
    budget = {"train": {"tokens": 50000}}
    with pytest.raises(UserError, match=r"sweep.studies.actfocus: train.tokens gives trials equal tokens, a pruner "):
        searches(tmp_path, "actfocus", budget)
    (plan,) = searches(tmp_path, "actfocus", budget, pruner={"kind": "none"})
    assert plan.configured(plan.baselines["paper"]).train.tokens == 50000


def test_an_unknown_study_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params.yaml: sweep.studies: 'alpha' is not there; allowed: actfocus, lear"):
        searches(tmp_path, "alpha")


# ------------------------------------------------------------------------------------------------- what is in params.yaml


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_studies_can_be_run_as_they_are_where_their_methods_are(tmp_path: Path, preset: str | None) -> None:
    own = {} if preset is None else read_yaml(ROOT / "presets" / preset / "overlay.yaml")
    path = params(tmp_path, own)
    config, checked = parse(json.loads(path.read_text())), 0
    (tmp_path / "policy").touch()
    for name, search in config.sweep.studies.items():
        if search.methods != "all" and not set(search.methods) <= set(config.methods):
            continue
        found = plans(path, name, tmp_path / "policy")
        own = [method for method, row in config.methods.items() if row.matched_to is None]
        assert [plan.method for plan in found] == (own if search.methods == "all" else search.methods)
        assert len({plan.name for plan in found}) == len(found)
        checked += 1
    assert checked >= 1
    assert preset is not None or checked == 2


def test_a_sweep_that_would_have_other_trials_has_another_name(tmp_path: Path) -> None:
    def name(folder: str, *changed: dict[str, Any], **sweep: Any) -> str:
        return searches(tmp_path / folder, "actfocus", *changed, **sweep)[0].name

    same = [
        name("a"),
        name("b", {"comparison": "other", "seeds": [5], "methods": {"grpo": {"learning_rate": 1e-3}}}),
        name("c", trials=64, confirm_seeds=[307], heartbeat=1.0),
    ]
    assert len(set(same)) == 1
    others = [
        name("d", seeds=[100]),
        name("e", seed=1),
        name("f", {"train": {"iterations": 20}}),
        name("g", studies={"actfocus": {"space": {BETA: {"high": 3.0}}}}),
        name("h", {"environments": {"frozen_lake": {"max_turns": 7}}}),
        name("i", score="area"),
    ]
    assert len({*others, same[0]}) == 7
