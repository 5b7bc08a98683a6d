"""Precision, numbers that are not finite, and an engine that is not the policy: what a training notices, and when."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.policy.model import load_policy
from pipeline.presets import overlay
from pipeline.training.iteration import Example
from pipeline.training.module import PolicyGradient, _Averages
from tests.trainings import LAKE, configured, fit, standing

PRECISIONS = ("float32", "bfloat16")
ROWS: dict[str, Any] = {
    "critic": {"advantage": {"kind": "gae", "critic": {"kind": "model"}}},
    "soft": {"advantage": {"kind": "soft_q", "q": {"kind": "model"}}, "surrogate": {"kind": "soft_q"}},
}


def at_rate(rate: float, **changes: Any) -> Any:
    return configured({"method_defaults": {"learning_rate": rate}, "methods": ROWS, **changes})


def begun(directory: Path, rate: float, dtype: str = "float32", method: str = "grpo") -> PolicyGradient:
    """A training that stands before its first update."""
    config = at_rate(rate)
    return standing(PolicyGradient(config, LAKE, method, 0, load_policy(directory, dtype=dtype)))


def examples(module: PolicyGradient) -> list[Example]:
    (iteration,) = module.rounds()
    return iteration.examples


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in module.parameters()])


# -------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_policy_goes_as_far_in_low_precision_as_in_float32(directory: Path, dtype: str) -> None:
    """Steps below the rounding of most weights, the same way each time: they must add up."""
    moved = {}
    for kind in ("float32", dtype):
        module = begun(directory, 2e-4, kind)
        before, own = flat(module.model), examples(begun(directory, 2e-4))
        for _ in range(12):
            module._update(own, 0, _Averages())
        moved[kind] = flat(module.model) - before
    share = float(moved[dtype] @ moved["float32"] / moved["float32"].square().sum())
    assert 0.9 < share < 1.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_target_network_follows_in_low_precision(directory: Path, dtype: str) -> None:
    """By half a percent of the distance at a time."""
    followed = {}
    for kind in ("float32", dtype):
        head: Any = begun(directory, 1e-4, kind, "soft").heads[0]
        start = flat(head.target_trunk)
        with torch.no_grad():
            for number, parameter in enumerate(head.trunk.parameters()):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        for _ in range(20):
            head.after_step()
        followed[kind] = flat(head.target_trunk) - start
    share = float(followed[dtype] @ followed["float32"] / followed["float32"].square().sum())
    assert 0.9 < share < 1.1


def test_gradients_of_low_precision_are_added_up_in_float32(directory: Path) -> None:
    module = begun(directory, 1e-4, "bfloat16")
    masters = module._masters()[0]
    for value in (256.0, *[1.0] * 64):
        for parameter in module.model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        masters.gather()
    assert {float(weight.grad.flatten()[0]) for weight in masters.weights} == {320.0}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_steps_that_vanish_are_refused_after_the_first_update(directory: Path, dtype: str) -> None:
    module = PolicyGradient(at_rate(1e-12), LAKE, "grpo", 0, load_policy(directory, dtype=dtype))
    with pytest.raises(
        ConfigError, match=re.escape("params.yaml: methods.grpo.learning_rate: a step of 1e-12")
    ) as raised:
        fit(module, 1)
    assert "allowed: " in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(module.curve) == 0


@pytest.mark.parametrize(("method", "section"), [("critic", "critic"), ("soft", "q")])
def test_vanishing_steps_of_a_head_are_refused_by_its_key(directory: Path, method: str, section: str) -> None:
    """From the first that moves anything: heads begin at 0, and nothing reaches their trunk before they have moved."""
    rows = overlay(ROWS, {method: {"advantage": {section: {"learning_rate": 1e-12}}}})
    module = standing(PolicyGradient(at_rate(1e-4, methods=rows), LAKE, method, 0, load_policy(directory)))
    own = examples(module)
    module._update(own, 0, _Averages())
    torch.nn.init.ones_(module.heads[0].head.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ConfigError, match=re.escape(f"methods.{method}.advantage.{section}.learning_rate: ")):
        module._update(own, 0, _Averages())


def test_the_smallest_rate_that_is_called_allowed_is_allowed(directory: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        fit(begun(directory, 1e-12), 1)
    fit(PolicyGradient(at_rate(float(str(raised.value).split()[-3])), LAKE, "grpo", 0, load_policy(directory)), 1)


def test_a_step_without_a_gradient_is_no_vanished_one(directory: Path) -> None:
    """Equal returns and no other term, parameters that nothing reaches; the first step that counts is watched then."""
    config = at_rate(1e-12, method_defaults={"learning_rate": 1e-12, "regulariser": {"entropy": 0.0, "kl": 0.0}})
    module = standing(PolicyGradient(config, LAKE, "grpo", 0, load_policy(directory)))
    own = examples(module)
    module._update([replace(e, advantage=torch.zeros_like(e.advantage)) for e in own], 0, _Averages())
    with pytest.raises(ConfigError, match=r"methods\.grpo\.learning_rate"):
        module._update([replace(e, advantage=torch.linspace(-1, 1, len(e.advantage))) for e in own], 0, _Averages())
