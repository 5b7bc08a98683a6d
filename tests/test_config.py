"""params.yaml, its presets and dvc.yaml against the schema, and what a mistake looks like to who made it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from pipeline.settings.method import Method
from pipeline.settings.params import Config, load, parse
from pipeline.settings.section import Section, number
from pipeline.settings.sweep import (
    Constraints,
    Integer,
    Logarithmic,
    LogarithmicFromZero,
    MedianPruner,
    Study,
    Sweep,
    Uniform,
)
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml, yaml_text
from tests.config_cases import PRESETS, ROOT, put, sections


@pytest.fixture
def raw() -> dict[str, Any]:
    """params.yaml, to be spoilt."""
    raw: dict[str, Any] = read_yaml(ROOT / "params.yaml")
    return raw


def mistakes(raw: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(raw)
    return str(error.value).split("\n")


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("rollouts", "rollouts: unknown key; did you mean 'rollout'?"),
        ("train.itertions", "train.itertions: unknown key; did you mean 'iterations'?"),
        ("environments.frozen_lake.max_turn", "unknown key; did you mean 'max_turns'?"),
        ("policy.demonstrations.phases.0.stepz", "unknown key; did you mean 'steps'?"),
        ("methods.grpo.wieght", "unknown key; did you mean 'weight'?"),
        ("methods.ppo.advantage.lamb", "unknown key; did you mean 'lam'?"),
        ("methods.ppo.advantage.critic.lerning_rate", "unknown key; did you mean 'learning_rate'?"),
        ("methods.grpo_actfocus.weight.reasonin_downweight", "unknown key; did you mean 'reasoning_downweight'?"),
        (
            "methods.grpo_actfocus.weight.zzz",
            "unknown key; allowed: answer_tag_weight, focus, form, kind, malformed_weight",
        ),
    ],
)
def test_a_misspelt_key_is_named_with_its_nearest_neighbour(raw: dict[str, Any], key: str, line: str) -> None:
    (found,) = mistakes(put(raw, key, 1))
    assert found.startswith(f"params.yaml: {key}: ")
    assert line in found


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("rollout.groups", 0, "rollout.groups: input should be greater than or equal to 1, got 0"),
        ("rollout.temperature", 0, "rollout.temperature: input should be greater than 0, got 0"),
        ("rollout.group_size", 1.5, "rollout.group_size: "),
        (
            "policy.demonstrations.phases.1.action_noise",
            3,
            "phases.1.action_noise: input should be less than or equal to 1",
        ),
        ("methods.ppo.advantage.gamma", 1.5, "methods.ppo.advantage.gamma: input should be less than or equal to 1"),
        (
            "method_defaults.learning_rate",
            float("nan"),
            "method_defaults.learning_rate: input should be a finite number",
        ),
        ("train.schedule", "cosine", "train.schedule: 'cosine' is not allowed; allowed: 'constant' or 'linear'"),
        ("policy.kind", "scrach", "policy.kind: 'scrach' is not known; did you mean 'scratch'?"),
        (
            "methods.grpo.weight",
            {"kind": "actfocsu"},
            "methods.grpo.weight.kind: 'actfocsu' is not known; did you mean 'actfocus'?",
        ),
        ("methods.grpo.weight", {}, "methods.grpo.weight.kind: missing"),
        ("methods.grpo", None, "methods.grpo: "),
        ("seeds", [], "seeds: "),
        ("seeds", [0, 0], "seeds must be distinct, got [0, 0]"),
        (
            "compare.uniform",
            {"grpo_actfocsu": "grpo"},
            "compare.uniform: unknown method 'grpo_actfocsu'; did you mean 'grpo_actfocus'?",
        ),
        ("environments.Lake", {"id": "actfocus/FrozenLake-v1"}, "environments.Lake"),
        ("method_defaults.learning_rate", True, "method_defaults.learning_rate: input should be a number, got true"),
        ("method_defaults.learning_rate", 2.0, "input should be less than or equal to 1, got 2.0"),
        ("method_defaults.learning_rate", "nan", "input should be a finite number, got 'nan'"),
        ("method_defaults.advantage.eps", 1e-300, "method_defaults.advantage.eps: must be at least 1e-12, got 1e-300"),
        ("rollout.temperature", 1e-30, "rollout.temperature: must be at least 0.001, got 1e-30"),
        ("rollout.batch_episodes", 10**6, "rollout.batch_episodes: input should be less than or equal to 4096"),
        ("train.betas", [0.9, 1.0], "train.betas.1: input should be less than 1, got 1.0"),
        ("train.minibatch", False, "train.minibatch: input should be a number, got false"),
        ("seeds", [True], "seeds.0: input should be a number, got true"),
        ("seeds", [-1], "seeds.0: input should be greater than or equal to 0, got -1"),
        ("seeds", [2**63], "seeds.0: input should be less than or equal to 4294967295, got 9223372036854775808"),
        ("policy.seed", -1, "policy.seed: input should be greater than or equal to 0, got -1"),
        ("policy.hidden_size", 60, "policy: hidden_size 60 must be divisible by 2 * heads (8)"),
        ("policy.demonstrations.phases.0.reasoning_words", [0, True], "reasoning_words.1: input should be a number"),
        ("evaluation.temperatures", [0.5, 0.5], "evaluation: temperatures must differ in their first six digits"),
        ("compare.control", {"grpo": "grpo"}, "compare.control: grpo is compared with itself; name another method"),
        (
            "compare.primary",
            "grpo_actfocsu",
            "compare.primary: 'grpo_actfocsu' is not a method of compare.uniform or compare.control; did you mean "
            "'grpo_actfocus'?",
        ),
        ("compare.smallest_effect", 0.0, "compare.smallest_effect: input should be greater than 0, got 0.0"),
        ("compare.family", "bonferroni", "compare.family: "),
        ("sweep.seeds", [100, 100], "sweep: seeds must be distinct, got [100, 100]"),
        ("sweep.confirm_seeds", [100], "sweep: confirm_seeds must be fresh, [100] are among seeds too"),
        ("sweep.seed", 2**33, "sweep.seed: input should be less than or equal to 4294967295"),
        ("sweep.studies.actfocus.methods", ["grpo", "grpo"], "studies.actfocus: methods must be distinct"),
        (
            "sweep.studies.learning_rates.space",
            {"method.weight.kind": {"kind": "choice", "values": [1, True]}},
            "values must be distinct, got [1, True]",
        ),
        (
            "sweep.studies.learning_rates.space",
            {"method.learning_rate": {"kind": "uniform", "low": False, "high": 1.0}},
            "space.method.learning_rate.low: input should be a number, got false",
        ),
    ],
)
def test_a_wrong_value_is_reported_with_its_key_and_what_is_allowed(
    raw: dict[str, Any], key: str, value: Any, line: str
) -> None:
    (found,) = mistakes(put(raw, key, value))
    assert found.startswith("params.yaml: ")
    assert line in found


def test_a_number_may_be_written_as_text_but_not_as_what_is_none(raw: dict[str, Any]) -> None:
    assert parse(put(raw, "method_defaults.learning_rate", "1e-4")).method_defaults.learning_rate == 1e-4
    for text in ("nan", "inf", "-inf", "Infinity"):
        (found,) = mistakes(put(raw, "method_defaults.learning_rate", text))
        assert "input should be a finite number" in found


def numbers(annotation: Any, notes: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    """The constraints of every number in a field's type."""
    if annotation in (int, float):
        yield [getattr(note, "metadata", [note]) for note in notes]
    own = getattr(annotation, "__metadata__", ())
    for inner in get_args(annotation)[:1] if own else get_args(annotation):
        yield from numbers(inner, (*notes, *own))


@pytest.mark.parametrize(
    "section",
    [*sections(), *(Uniform, Logarithmic, LogarithmicFromZero, Integer, Study, MedianPruner, Constraints, Sweep)],
    ids=lambda section: section.__name__,
)
def test_every_number_of_the_schema_has_both_bounds_and_is_not_true(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        for constraints in numbers(field.annotation, tuple(field.metadata)):
            told = [note for notes in constraints for note in notes]
            low, high = ([n for n in told if any(hasattr(n, a) for a in pair)] for pair in (("ge", "gt"), ("le", "lt")))
            assert low, f"{section.__name__}.{name} has no lower bound"
            assert high, f"{section.__name__}.{name} has no upper bound"
            assert any(getattr(n, "func", None) is number for n in told), f"{section.__name__}.{name} takes true for 1"


def test_every_mistake_has_a_line_of_its_own(raw: dict[str, Any]) -> None:
    found = mistakes(put(put(raw, "rollout.groups", 0), "train.itertions", 3))
    assert [line.split(": ")[1] for line in found] == ["rollout.groups", "train.itertions"]


@pytest.mark.parametrize(
    ("key", "value", "keys"),
    [
        ("method_defaults.filter", {"kind": "al"}, ["method_defaults.filter.kind"]),
        ("method_defaults.surrogate.lo", 0.1, ["method_defaults.surrogate.lo"]),
        ("method_defaults.fliter", {"kind": "all"}, ["method_defaults.fliter"]),
        ("method_defaults.learning_rate", -1, ["method_defaults.learning_rate"]),
        (
            "method_defaults",
            {},
            [f"method_defaults.{slot}" for slot, field in Method.model_fields.items() if field.is_required()],
        ),
        ("method_defaults", None, ["method_defaults"]),
    ],
)
def test_a_mistake_in_method_defaults_is_reported_once(
    raw: dict[str, Any], key: str, value: Any, keys: list[str]
) -> None:
    assert [line.split(": ")[1] for line in mistakes(put(raw, key, value))] == keys


def test_a_slot_misspelt_in_method_defaults_is_not_reported_as_missing_in_every_method(raw: dict[str, Any]) -> None:
    raw["method_defaults"]["fliter"] = raw["method_defaults"].pop("filter")
    assert [line.split(": ")[1] for line in mistakes(raw)] == ["method_defaults.filter", "method_defaults.fliter"]


def test_a_methods_own_mistake_is_reported_beside_the_same_one_in_method_defaults(raw: dict[str, Any]) -> None:
    spoilt = put(put(raw, "method_defaults.learning_rate", -1), "methods.grpo.learning_rate", -2)
    found = [line.split(": ")[1] for line in mistakes(spoilt)]
    assert found == ["method_defaults.learning_rate", "methods.grpo.learning_rate"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {
                "methods.grpo.weight": {
                    "kind": "actfocus",
                    "redistribution_strength": 0,
                    "redistribution_temperature": 0.5,
                }
            },
            "methods.grpo.weight: redistribution_temperature has no effect while redistribution_strength is 0",
        ),
        (
            {"methods.grpo.regulariser": {"kind": "fixed", "entropy": 0.0, "kl": 0.0, "kl_estimator": "k1"}},
            "methods.grpo.regulariser: kl_estimator has no effect while kl is 0",
        ),
        (
            {"methods.grpo.advantage": {"kind": "group", "std": False, "ddof": 0}},
            "methods.grpo.advantage: ddof has no effect while std is false",
        ),
        (
            {"methods.grpo.weight": {"kind": "actfocus", "redistribution_strength": 1.5, "form": "softmax"}},
            "methods.grpo.weight: form softmax needs redistribution_strength <= 1",
        ),
        (
            {"train.passes": 1, "train.minibatch": 128},
            "methods.ppo.surrogate: a rule on the ratio does nothing with one update per iteration of",
        ),
        # 40 episodes, minibatches of 32: the last 8 join the first minibatch.
        (
            {"rollout.group_size": 5, "train.passes": 1, "train.minibatch": 32},
            "methods.ppo.surrogate: a rule on the ratio does nothing with one update per iteration of",
        ),
        ({"train.minibatch": 200}, "train.minibatch (200) exceeds an iteration's 128 episodes"),
        ({"methods.grpo.advantage": {"kind": "group", "critic": {}}}, "methods.grpo.advantage.critic: unknown key"),
    ],
)
def test_a_knob_without_effect_is_refused(raw: dict[str, Any], changes: dict[str, Any], line: str) -> None:
    for key, value in changes.items():
        raw = put(raw, key, value)
    (found,) = mistakes(raw)
    assert line in found


def test_zero_redistribution_is_allowed_while_nothing_depends_on_it(raw: dict[str, Any]) -> None:
    weight = {"kind": "actfocus", "redistribution_strength": 0, "redistribution_temperature": 1.0, "form": "sigmoid"}
    parse(put(raw, "methods.grpo.weight", weight))


def test_a_method_inherits_the_slots_that_it_does_not_name_and_no_part_of_one_that_it_does(raw: dict[str, Any]) -> None:
    config = parse(put(raw, "methods.mine", {"advantage": {"kind": "group", "std": False}, "learning_rate": 3e-4}))
    mine = config.methods["mine"]
    assert mine.surrogate == config.method_defaults.surrogate
    assert mine.advantage.model_dump() == {"entropy_scale": 0.0, "kind": "group", "std": False, "ddof": 1, "eps": 1e-6}
    assert mine.learning_rate == 3e-4


def test_1e_4_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: 1e-4\nb: 3E5\nc: on\n", encoding="utf-8")
    assert read_yaml(tmp_path / "params.yaml") == {"a": 0.0001, "b": 300000.0, "c": "on"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- 1\n", "must be a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "not valid YAML"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_that_is_not_a_params_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'params.yaml'}: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


ALIASES = """\
methods:
  a: &a {weight: &w {kind: actfocus}}
  b: *a
  c:
    <<: *a
    weight: *w
"""


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (ALIASES, ["methods.b: *a", "methods.c.<<: *a", "methods.c.weight: *w"]),
        ("environments: {x: &x {id: y}, z: *x}\n", ["environments.z: *x"]),
        ("sweep:\n  seeds: &s [1, &one 2]\n  confirm_seeds: *s\n  trials: *one\n", ["sweep.confirm_seeds: *s",
         "sweep.trials: *one"]),
        ("a: &a [*a]\n", ["a.0: *a"]),
    ],
)  # fmt: skip
def test_an_alias_is_refused_by_its_key(tmp_path: Path, text: str, keys: list[str]) -> None:
    """Whatever edits one place of it, such as `dvc exp run -S`, would change the others too."""
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml")
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'params.yaml'}: {key} is an alias; an edit of its values would change every place that shares them: "
        "write them out here"
        for key in keys
    ]


def test_what_only_looks_like_an_alias_is_read(tmp_path: Path) -> None:
    text = "a: &unused 1  # 2 * 3\nb: '*a'\nc: x*y & z\n"
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "params.yaml") == {"a": 1, "b": "*a", "c": "x*y & z"}


@pytest.mark.parametrize(
    "key",
    [
        "methods.grpo_actfocus.weight.reasoning_downweight",
        "methods.ppo_actfocus.weight.reasoning_downweight",
        "methods.ppo.advantage.critic.coefficient",
    ],
)
def test_an_override_by_dvc_changes_the_key_that_it_names_and_no_other(tmp_path: Path, key: str) -> None:
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    file.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(file, [f"{key}=0.21"])
    assert read_yaml(file) == put(read_yaml(ROOT / "params.yaml"), key, 0.21)


def test_no_yaml_that_is_edited_by_hand_has_an_alias() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for file in documents for block in re.findall(r"```yaml\n(.*?)```", file.read_text(), flags=re.S)]
    files = [ROOT / "params.yaml", *(ROOT / "presets" / name / "overlay.yaml" for name in PRESETS)]
    assert len(blocks) > 10
    for text in (*blocks, *(file.read_text(encoding="utf-8") for file in files)):
        assert not re.search(r"[:\-,\[{]\s+[&*]\w", re.sub("#.*", "", text)), text[:200]


def test_yaml_that_is_written_has_no_alias_where_parts_are_shared() -> None:
    shared = {"kind": "actfocus", "values": [1e-4, "1e-4"]}
    text = yaml_text({"b": shared, "a": {"c": shared}})
    assert not re.search("[&*]", text)
    assert YAML(typ="safe", pure=True).load(text) == {"b": shared, "a": {"c": shared}}


def test_a_config_is_frozen_and_survives_a_round_trip() -> None:
    config = load(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.workers = 3
    assert Config.model_validate(config.model_dump(mode="json")) == config
