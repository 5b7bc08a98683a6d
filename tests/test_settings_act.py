"""Every setting of every published method does something: changed, a short training ends in other weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic.fields import FieldInfo

from pipeline.model.policy import Policy
from pipeline.rollout.branching import GROWTHS
from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay, preset_values
from pipeline.settings.section import Section
from pipeline.training.module import PolicyGradient
from tests.trainings import LAKE, ROOT, TINY, fit, same, supervised, weights

# In one process: most cases of a method share the training that nothing is changed in.
pytestmark = pytest.mark.xdist_group("settings")
SLOTS = ("branching", "reward", "filter", "advantage", "weight", "aggregation", "surrogate", "regulariser")
EASY = {"size": 3, "frozen": 0.9, "success_rate": 1.0, "least_distance": 1, "max_actions": 8, "grid": "first"}
SKILLED = [{"steps": 200, "reasoning_words": [0, 1], "action_noise": 0.2}]
"""Some episodes must succeed, and not all."""

PRESETS: dict[str, dict[str, int]] = {
    "methods": {"groups": 4, "group_size": 4},
    "branching": {"groups": 2, "group_size": 8},
}
"""Whose rows are looked at, and the budget of an iteration at toy size."""
LARGEST = {"initial": 4, "width": 2}
"""Of branching within that budget."""
SHARE = 0.5
"""Of it, at another temperature: of 1/64 there would be no episode."""

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
    "surrogate.balanced_clip.high_step": 0.2,
    "surrogate.balanced_clip.dual": 1.01,
    "surrogate.balanced_clip.positive_share": 0.9,
    "regulariser.entropy_band.low": 0.99,
    "regulariser.entropy_band.high": 100.0,
    "regulariser.fixed.kl": 0.3,
    "regulariser.fixed.entropy": 0.1,
    "weight.role_ramp.reasoning_end": 0.601,
    "weight.role_ramp.reasoning_growth": 0.1,
    "weight.role_ramp.action_end": 0.7,
    "weight.role_ramp.bounds": [1.1, 8.0],
    "advantage.gated_progress.windows": 2,
    "weight.spurious_mask.quantile": 0.2,
    "branching.entropy_rise.monitor_slope": 20.0,
    "branching.entropy_rise.base": 0.0,
    "branching.entropy_rise.slope": 5.0,
    "branching.entropy_rise.penalty": 1.0,
    "branching.entropy_rise.tokens": 1,
    "branching.entropy_rise.width": 2,
    "branching.positions.initial": 2,
    "branching.positions.width": 2,
    "branching.positions.bounds": [0.999, 1.001],
    "branching.tree_search.width": 3,
    "branching.tree_search.exploration": 0.0,
    "branching.tree_search.discount": 0.1,
    "branching.temperature_shift.target": 10.0,
    "branching.temperature_shift.high": 1.5,
    "advantage.siblings.format": [0.5, -0.5],
    "surrogate.ppo_clip.dual": 1.01,
    "surrogate.straight_through_clip.dual": 1.01,
    "surrogate.procedure_clip.dual": 1.01,
    "surrogate.procedure_clip.safety": 1.001,
    "surrogate.procedure_clip.largest_shift": 0.01,
    "surrogate.procedure_clip.half_life": 2.0,
    "surrogate.procedure_clip.bound": 1.001,
}
# Where a setting has something to act on: other settings of its section, changed in the baseline too.
WHERE: dict[str, dict[str, Any]] = {
    "surrogate.covariance_clip": {"band": [0.0, 5.0], "low": 0.2, "high": 0.2},
    "surrogate.balanced_clip": {"low": [0.5, 1.0], "high": [1.0, 3.0], "high_step": 0.02, "positive_share": 0.5},
    "surrogate.sequence_clip": {"low": 0.01, "high": 0.01},
    "regulariser.entropy_target": {"target": 1.5},
    "regulariser.entropy_target.largest": {"target": 1.5, "rate": 1.0},
    "weight.role_ramp.action_growth": {"action_start": 0.6},
    "weight.role_ramp.action_end": {"action_start": 0.6, "action_growth": 0.3},
    "weight.spurious_mask": {"probability": 0.9},
    "regulariser.fixed.kl_estimator": {"kl": 0.1},
    "advantage.gae.discount": {"gamma": 0.9},
    "branching.entropy_rise.monitor_slope": {"initial": "monitored"},
    "branching.entropy_rise.tokens": {"base": 0.5},  # then the sign of dH decides, whatever its size
    "branching.entropy_rise.penalty_per": {"penalty": 0.5},
    "branching.positions.signal": {"discount": None, "bounds": None},
    "branching.positions.among": {"side": "before"},
    "branching.positions.candidates": {"signal": "entropy", "discount": None, "bounds": None},
    "branching.temperature_shift.low": {"target": 0.0},
}
# Settings that the first method with them refuses, or where they have next to nothing to act on.
ROWS = {
    "aggregation.weight_sum.count": "grpo",
    "aggregation.token_mean.count": "cispo",
    "advantage.siblings.format": "seea_r1",
}
# Settings that every row with them refuses.
REFUSED = {"advantage.soft_q.entropy_scale", "reward.token_entropy.failure", "reward.sequence_entropy.failure"}


@cache
def base(preset: str) -> Config:
    """The preset's rows at toy size; a step large enough for ratios to leave their bounds."""
    tiny = {key: value for key, value in TINY.items() if key != "method_defaults"}
    changes = {
        **tiny,
        "environments": {
            "sokoban": None,
            LAKE: {"max_turns": 4, "response_tokens": 20, "context_tokens": 400, "settings": EASY},
        },
        "rollout": PRESETS[preset],
        "bottleneck": {"groups": 4},
        "train": {"iterations": 3, "minibatch": 8, "passes": 2, "tokens": None},
        "policy": overlay(TINY["policy"], {"demonstrations": {"phases": SKILLED}}),
        "root": ".",
        "out": ".",
        "params_file": "params.yaml",
    }
    raw = overlay(preset_values(preset, ROOT), changes)
    given = {"learning_rate": 3e-3, "matched_to": None}
    raw["methods"] = {name: {**row, **given} for name, row in raw["methods"].items()}
    for row in raw["methods"].values():
        own = row.get("branching", {})
        own |= {key: min(own[key], most) for key, most in LARGEST.items() if isinstance(own.get(key), int)}
        own |= {"share": SHARE} if "share" in own else {}
    return parse(raw)


@cache
def reference() -> Policy:
    return supervised(base("methods"))


def leaves(section: Section, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo, Any]]:
    for name, value in section:
        if isinstance(value, Section):
            yield from leaves(value, (*path, name))
        elif name != "kind":
            yield (*path, name), type(section).model_fields[name], value


def cases() -> Iterator[Any]:
    """Each setting once, in the first method that has it or in that of ``ROWS``; those without effect there are in ``WHERE``."""
    seen = set()
    for preset in PRESETS:
        for method, row in base(preset).methods.items():
            for slot in SLOTS:
                section = getattr(row, slot)
                for path, field, value in leaves(section, (slot,)):
                    name = ".".join((slot, section.kind, *path[1:]))
                    if name not in seen and ROWS.get(name, method) == method:
                        seen.add(name)
                        if name not in REFUSED:
                            yield pytest.param(preset, method, path, name, field, value, id=name)


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


def of_slot(slot: str, changes: dict[str, Any]) -> str:
    """What is laid over a row, as the key of a training; without changes one training is that of all slots."""
    return repr({slot: changes} if changes else {})


@cache
def trained(preset: str, method: str, changes: str) -> dict[str, torch.Tensor]:
    """Weights after a short training with some settings changed; ``changes`` comes from ``of_slot``."""
    raw = base(preset).model_dump(mode="json")
    raw["methods"] = {method: overlay(raw["methods"][method], eval(changes))}
    raw["compare"] = {}
    config = parse(raw)
    policy = Policy(copy.deepcopy(reference().model), reference().tokenizer)
    module = fit(PolicyGradient(config, LAKE, method, 0, policy), 3)
    assert sum(row.get("non_finite_losses", 0) for row in module.curve) == 0  # none where no group is kept
    assert sum(row["success"] for row in module.curve) > 0
    return weights(module.model)


@pytest.mark.parametrize(("preset", "method", "path", "name", "field", "value"), cases())
def test_a_changed_setting_changes_the_policy(
    preset: str, method: str, path: tuple[str, ...], name: str, field: FieldInfo, value: Any
) -> None:
    context = WHERE.get(name, WHERE.get(".".join(name.split(".")[:2]), {}))
    if path[-1] in context:
        value = context[path[-1]]
    changed = {path[-1]: another(name, field, value)}
    for step in reversed(path[1:-1]):
        changed = {step: changed}
    assert changed != {path[-1]: value}
    plain = trained(preset, method, of_slot(path[0], context))
    other = trained(preset, method, of_slot(path[0], {**context, **changed}))
    assert not same(plain, other), name


def test_the_same_settings_give_the_same_weights() -> None:
    """Else the test above could not fail."""
    assert same(trained("methods", "grpo", "{}"), trained.__wrapped__("methods", "grpo", "{}"))


@pytest.mark.parametrize(
    ("slot", "changes"),
    [
        ("branching", {"initial": 4}),
        ("branching", {"penalty": None, "penalty_per": None}),
        ("branching", {"penalty": 0.5, "penalty_per": "path"}),
        ("surrogate", {"kind": "ppo_clip"}),
        ("advantage", {"entropy_scale": None}),
    ],
    ids=["budget", "penalty", "penalty per path", "clip", "advantage"],
)
def test_each_part_of_aepo_acts(slot: str, changes: dict[str, Any]) -> None:
    """Its four parts can be switched off one by one, and each of them is missed."""
    context = {"penalty": 0.5} if "penalty_per" in changes else {}
    plain = trained("branching", "aepo", of_slot(slot, context))
    assert not same(plain, trained("branching", "aepo", of_slot(slot, context | changes)))


def test_there_is_a_case_for_every_kind_of_every_slot() -> None:
    kinds = set()
    for preset in PRESETS:
        raw = preset_values(preset, ROOT)
        assert set(raw["methods"]) == set(base(preset).methods)
        rows = base(preset).model_dump()["methods"].values()
        kinds |= {(slot, row[slot]["kind"]) for row in rows for slot in SLOTS}
    assert {kind for slot, kind in kinds if slot == "branching"} == set(GROWTHS)
    assert len(kinds) > 40
