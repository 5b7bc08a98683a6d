"""Every setting of every published method does something: changed, a short training ends in other weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic.fields import FieldInfo

from pipeline.config import Config, parse, read_yaml
from pipeline.policy.model import Policy
from pipeline.presets import overlay
from pipeline.section import Section
from pipeline.training.module import PolicyGradient
from tests.test_training import LAKE, ROOT, TINY, fit, same, supervised, weights

SLOTS = ("reward", "filter", "advantage", "weight", "aggregation", "surrogate", "regulariser")
EASY = {"size": 3, "frozen": 0.9, "success_rate": 1.0, "least_distance": 1, "max_actions": 8, "grid": "first"}
SKILLED = [{"steps": 200, "reasoning_words": [0, 1], "action_noise": 0.2}]
"""Some episodes must succeed, and not all."""

# What a setting is changed to, where half of it, another choice or the opposite would not do.
CHANGED: dict[str, Any] = {
    "clip": 1e-3,
    "warmup_iterations": 1,
    "skip_above_kl": 1e-7,
    "polyak": 0.5,
    "huber_delta": 1e-4,
    "kl_weight": 1.0,
    "think_tag_weight": 0.7,
    "eps": 0.5,
    "entropy_scale": 0.2,
    "advantage.bilevel_gae.gamma": 0.9,
    "surrogate.covariance_clip.share": 0.5,
    "surrogate.covariance_clip.band": [0.5, 5.0],
    "surrogate.covariance_kl.share": 0.5,
    "surrogate.balanced_clip.low": [0.9, 1.0],
    "surrogate.balanced_clip.high": [1.3, 3.0],
    "surrogate.balanced_clip.step": 0.2,
    "surrogate.balanced_clip.positive_share": 0.9,
    "regulariser.entropy_band.low": 0.99,
    "regulariser.entropy_band.high": 100.0,
    "regulariser.fixed.kl": 0.3,
    "regulariser.fixed.entropy": 0.1,
    "weight.role_ramp.reasoning_end": 0.3,
    "weight.role_ramp.reasoning_growth": 0.1,
    "weight.pivots.buckets": 2,
    "weight.spurious_mask.quantile": 0.2,
}
# Where a setting has something to act on: other settings of its section, changed in the baseline too.
WHERE: dict[str, dict[str, Any]] = {
    "surrogate.covariance_clip": {"band": [0.0, 5.0]},
    "surrogate.balanced_clip": {"low": [0.5, 1.0], "high": [1.0, 3.0], "step": 0.02},
    "surrogate.sequence_clip": {"low": 0.01, "high": 0.01},
    "regulariser.entropy_target": {"target": 1.5},
    "regulariser.entropy_target.largest": {"target": 1.5, "rate": 1.0},
    "advantage.entropy_gae": {"budget": 1.5},
    "weight.spurious_mask": {"probability": 0.9},
    "regulariser.fixed.kl_estimator": {"kl": 0.1},
    "advantage.gae.discount": {"gamma": 0.9},
}


@cache
def base() -> Config:
    """The preset's rows at toy size; a step large enough for ratios to leave their bounds."""
    tiny = {key: value for key, value in TINY.items() if key != "method_defaults"}
    changes = {
        **tiny,
        "environments": {LAKE: {"max_turns": 4, "response_tokens": 20, "context_tokens": 400, "settings": EASY}},
        "rollout": {"groups": 4, "group_size": 4},
        "bottleneck": {"groups": 4},
        "train": {"iterations": 3, "minibatch": 8, "passes": 2},
        "policy": overlay(TINY["policy"], {"demonstrations": {"phases": SKILLED}}),
        "root": ".",
        "out": ".",
        "params_file": "params.yaml",
    }
    raw = overlay(read_yaml(ROOT / "presets" / "methods" / "params.yaml"), changes)
    raw["methods"] = {name: {**row, "learning_rate": 3e-3} for name, row in raw["methods"].items()}
    return parse(raw)


@cache
def reference() -> Policy:
    return supervised(base())


def leaves(section: Section, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo, Any]]:
    for name, value in section:
        if isinstance(value, Section):
            yield from leaves(value, (*path, name))
        elif name != "kind":
            yield (*path, name), type(section).model_fields[name], value


def cases() -> Iterator[Any]:
    """Each setting once, in the first method that has it; settings that have no effect there are in ``WHERE``."""
    seen = set()
    for method, row in base().methods.items():
        for slot in SLOTS:
            section = getattr(row, slot)
            for path, field, value in leaves(section, (slot,)):
                name = ".".join((slot, section.kind, *path[1:]))
                if name not in seen:
                    seen.add(name)
                    if name != "advantage.soft_q.entropy_scale":  # refused
                        yield pytest.param(method, path, name, field, value, id=name)


def another(name: str, field: FieldInfo, value: Any) -> Any:
    leaf = name.split(".")[-1]
    for key in (name, leaf):
        if key in CHANGED:
            return CHANGED[key]
    if isinstance(value, bool):
        return not value
    options = [
        o for a in (field.annotation, *get_args(field.annotation)) if get_origin(a) is Literal for o in get_args(a)
    ]
    if options:
        return next(option for option in options if option != value)
    assert isinstance(value, float | int), name
    return value / 2 if value else 0.5


@cache
def trained(method: str, slot: str, changes: str) -> dict[str, torch.Tensor]:
    """Weights after a short training with some settings of a slot changed; ``changes`` is their repr."""
    raw = base().model_dump(mode="json")
    raw["methods"] = {method: overlay(raw["methods"][method], {slot: eval(changes)})}
    raw["compare"] = {}
    config = parse(raw)
    policy = Policy(copy.deepcopy(reference().model), reference().tokenizer)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    module = fit(PolicyGradient(config, LAKE, method, 0, policy), 3)
    torch.set_num_threads(before)
    assert sum(row["non_finite_losses"] for row in module.curve) == 0
    assert sum(row["success"] for row in module.curve) > 0
    return weights(module.model)


@pytest.mark.parametrize(("method", "path", "name", "field", "value"), cases())
def test_a_changed_setting_changes_the_policy(
    method: str, path: tuple[str, ...], name: str, field: FieldInfo, value: Any
) -> None:
    context = WHERE.get(name, WHERE.get(".".join(name.split(".")[:2]), {}))
    if path[-1] in context:
        value = context[path[-1]]
    changed = {path[-1]: another(name, field, value)}
    for step in reversed(path[1:-1]):
        changed = {step: changed}
    assert changed != {path[-1]: value}
    plain = trained(method, path[0], repr(context))
    other = trained(method, path[0], repr({**context, **changed}))
    assert not same(plain, other), name


def test_the_same_settings_give_the_same_weights() -> None:
    """Else the test above could not fail."""
    one = trained("grpo", "weight", "{}")
    trained.cache_clear()
    assert same(one, trained("grpo", "weight", "{}"))


def test_there_is_a_case_for_every_kind_of_every_slot() -> None:
    raw = read_yaml(Path(ROOT / "presets" / "methods" / "params.yaml"))
    kinds = {(slot, row[slot]["kind"]) for row in base().model_dump()["methods"].values() for slot in SLOTS}
    assert len(kinds) > 30
    assert set(raw["methods"]) == set(base().methods)
