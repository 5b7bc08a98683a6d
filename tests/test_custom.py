"""Functions of one's own in the slots: found, called, held to the slots' promises, and looked at by the suite of contracts."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from pipeline.contracts.slot import BATCHES, CONTRACTS, SECTIONS, check_slot, made_up, taken
from pipeline.objective.batch import TokenBatch
from pipeline.objective.custom import check_functions
from pipeline.objective.methods import (
    coefficients,
    entropy_terms,
    select_groups,
    shape_rewards,
    token_advantages,
    token_weights,
)
from pipeline.objective.regularisers import EntropyTerms
from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay
from pipeline.sweep.space import configured, current
from pipeline.tracking.training import flatten
from pipeline.trajectories.trajectory import RESPONSE_ROLES
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.batches import batches, method, properties

ROOT = Path(__file__).parents[1]
MODULE = "custom_test_functions"


@pytest.fixture
def own() -> Iterator[types.ModuleType]:
    """A module of somebody's own, to be filled."""
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    yield module
    del sys.modules[MODULE]


def custom(name: str = "function", **others: Any) -> dict[str, Any]:
    return {"kind": "custom", "function": f"{MODULE}:{name}", **others}


def chosen(batch: TokenBatch, values: torch.Tensor) -> torch.Tensor:
    return torch.where(batch.trainable, values, 0.0)


# ----------------------------------------------------------------------------------------------- what slots do with them


def test_each_slot_has_what_its_function_returns(own: Any) -> None:
    batch = made_up(0)
    own.reward = lambda batch, *, factor: factor * batch.reward
    own.filter = lambda batch: batch.success
    own.advantage = lambda batch, *, less: chosen(batch, batch.returns[batch.trajectory] - less)
    own.weight = lambda batch: chosen(batch, batch.entropy)
    own.aggregation = lambda weight, trainable, trajectory, *, by: weight / by
    own.regulariser = lambda batch, *, bonus=0.5: torch.full_like(batch.entropy, bonus)
    row = method(
        reward=custom("reward", settings={"factor": 2}),
        filter=custom("filter"),
        advantage=custom("advantage", settings={"less": 0.25}),
        weight=custom("weight"),
        aggregation=custom("aggregation", settings={"by": 8.0}),
        regulariser=custom("regulariser", kl=0.1),
    )
    shaped = shape_rewards(row, batch)
    assert torch.equal(shaped.reward, 2 * batch.reward)
    torch.testing.assert_close(shaped.returns, 2 * batch.returns)
    assert torch.equal(select_groups(row, batch), batch.success)
    estimate = token_advantages(row, shaped, {})
    assert torch.equal(estimate.advantage, chosen(batch, shaped.returns[batch.trajectory] - 0.25))
    assert not estimate.targets
    weights = token_weights(row, batch)
    assert torch.equal(weights, chosen(batch, batch.entropy))
    assert torch.equal(coefficients(row, weights, batch.trainable, batch.trajectory), weights / 8)
    terms, remembered = entropy_terms(row, batch)
    assert set(terms.bonus.tolist()) == {0.5}
    assert not terms.penalty.any()
    assert remembered == {}
    own.regulariser = lambda batch: EntropyTerms(*[batch.entropy] * 4)
    assert torch.equal(entropy_terms(row, batch)[0].high, batch.entropy)


@properties
@given(batch=batches())
def test_shuffled_weights_are_each_roles_own_in_the_order_of_the_noise(batch: TokenBatch) -> None:
    module: Any = sys.modules.setdefault(MODULE, types.ModuleType(MODULE))
    module.function = lambda batch: chosen(batch, batch.entropy)
    plain = token_weights(method(weight=custom()), batch)
    shuffled = token_weights(method(weight=custom(shuffle=True)), batch)
    del sys.modules[MODULE]
    for role in RESPONSE_ROLES:
        mask = batch.of(role)
        index = torch.nonzero(mask).squeeze(-1).tolist()
        expected = [plain[t].item() for t in sorted(index, key=lambda t: batch.noise[t].item())]
        assert [shuffled[t].item() for t in index] == expected
    assert not shuffled[~batch.trainable].any()


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "text": ("weight", lambda batch: "heavy", "returned a str; allowed: a tensor of shape"),
    "shape": ("weight", lambda batch: batch.returns, "returned a tensor of shape (12,)"),
    "dtype": ("advantage", lambda batch: batch.entropy.double(), "torch.float64, on cpu; allowed: a tensor of shape"),
    "not finite": (
        "reward",
        lambda batch: batch.entropy / 0,
        "returned nan for token 0 of trajectory 0; allowed: finite numbers",
    ),
    "elsewhere": ("advantage", lambda batch: batch.entropy + 1, "for a token that the policy did not choose"),
    "negative": ("weight", lambda batch: -batch.entropy, "returned the weight -"),
    "no truth": ("filter", lambda batch: batch.returns, "allowed: a tensor of shape (12,), torch.bool, on cpu"),
    "no gradient": ("surrogate", lambda tokens: tokens.advantage, "a loss without a gradient"),
    "factor": (
        "aggregation",
        lambda weight, trainable, trajectory: weight + 1,
        "a factor of a token that has no weight",
    ),
    "bonus": ("regulariser", lambda batch: batch.returns, "returned a tensor of shape (12,)"),
    "raised": ("weight", lambda batch: batch.nothing, "raised AttributeError: 'TokenBatch' object has no attribute"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_slot_cannot_take_is_told_with_the_functions_name(name: str, own: Any) -> None:
    slot, own.function, told = WRONG[name]
    (line,) = check_slot(slot, f"{MODULE}:function")
    assert line.startswith(f"form: {slot}.function: '{MODULE}:function' ")
    assert told in line


def test_a_branch_is_not_kept_without_its_parent(own: Any) -> None:
    own.function = lambda batch: torch.arange(batch.trajectories) > 0
    batch = replace(made_up(0), parent=torch.tensor([-1, 0] + [-1] * 10))
    with pytest.raises(UserError, match="a branch without its parent"):
        select_groups(method(filter=custom()), batch)


# ------------------------------------------------------------------------------------------------------- what is refused


def lake(changes: dict[str, Any]) -> Config:
    return parse(overlay(read_yaml(ROOT / "params.yaml"), changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "module": (
        {"function": "custom_test_nowhere:f"},
        "function: 'custom_test_nowhere:f' cannot be used: No module named",
    ),
    "name": ({"function": f"{MODULE}:wieght"}, f"function: '{MODULE}:wieght' cannot be used: {MODULE} has no function"),
    "unknown": (
        {"settings": {"strenght": 1}},
        f"settings.strenght: no setting of {MODULE}:function; allowed: strength, b",
    ),
    "missing": ({}, f"settings.strength: missing, and {MODULE}:function has no default for it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_function_that_cannot_be_used_is_one_line_before_anything_runs(name: str, own: Any) -> None:
    def function(batch: TokenBatch, *, strength: float, b: int = 1) -> torch.Tensor:
        return chosen(batch, batch.entropy)

    own.function, (section, told) = function, REFUSED[name]
    config = lake({"methods": {"mine": {"weight": custom() | section}, "again": {}}})
    with pytest.raises(UserError) as error:
        check_functions(config, "params.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"params.yaml: methods.mine.weight.{told}")


def test_what_method_defaults_name_is_told_once(own: Any) -> None:
    config = lake({"method_defaults": {"weight": custom()}})
    with pytest.raises(UserError, match=r"^params.yaml: method_defaults.weight.function: [^\n]*$"):
        check_functions(config, "params.yaml")


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_test_broken.py").write_text("import math\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = {"mine": {"weight": custom() | {"function": "custom_test_broken:f"}}}
    with pytest.raises(
        UserError, match=r"raised ZeroDivisionError: division by zero \(custom_test_broken.py, line 2\)$"
    ):
        check_functions(lake({"methods": broken}), "params.yaml")


@pytest.mark.parametrize(
    ("slots", "line"),
    [
        (
            {"weight": {"kind": "custom", "function": "weight"}},
            "weight.function: 'weight' is not allowed; allowed: module",
        ),
        ({"weight": {"kind": "custom"}}, "weight.function: missing"),
        ({"branching": custom()}, "branching.kind: 'custom' is not known; allowed: entropy_rise, none"),
        ({"regulariser": custom(entropy=0.1)}, "regulariser: entropy has no effect while the function gives the bonus"),
        (
            {"reward": custom(), "branching": {"kind": "tree_search"}, "advantage": {"kind": "siblings"}},
            "reward custom is",
        ),
    ],
)
def test_the_schema_refuses(slots: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: methods\.mine") as error:
        lake({"methods": {"mine": slots}})
    assert line in str(error.value)


def test_rules_that_need_to_know_a_choice_leave_ones_own_alone() -> None:
    for slots in (
        {"reward": custom(), "advantage": {"kind": "token_group"}},
        {"reward": {"kind": "token_entropy"}, "advantage": custom()},
        {"branching": {"kind": "tree_search"}, "advantage": custom()},
        {"surrogate": custom(), "aggregation": custom(count="with_advantage"), "advantage": custom()},
    ):
        row = method(**slots)
        assert set(custom_sections(row)) == {slot for slot, section in slots.items() if section["kind"] == "custom"}


def test_a_surrogate_of_ones_own_may_have_one_update() -> None:
    raw = read_yaml(ROOT / "params.yaml") | {"compare": {}, "methods": {"mine": {"surrogate": custom()}}}
    raw["train"] |= {"minibatch": 128, "passes": 1}
    parse(raw)
    with pytest.raises(UserError, match="one update per iteration"):
        parse(raw | {"methods": {"mine": {"weight": custom()}}})


# ------------------------------------------------------------------------------------------------ sweeps and tables


def test_its_settings_are_searched_and_tracked_like_any_other() -> None:
    raw = overlay(
        read_yaml(ROOT / "params.yaml"),
        {"methods": {"mine": {"weight": custom(settings={"strength": 0.5, "form": "flat"})}}},
    )
    key = "method.weight.settings.strength"
    assert current(parse(raw), "mine", key) == 0.5
    drawn = configured(raw, "mine", {key: 2.0}, "a trial").methods["mine"]
    assert custom_sections(drawn)["weight"].settings == {"strength": 2.0, "form": "flat"}
    assert flatten({"method": drawn.model_dump(mode="json")})["method.weight.settings.strength"] == 2.0
    with pytest.raises(UserError, match="'width' is no setting of mine; allowed there: strength, form"):
        current(parse(raw), "mine", "method.weight.settings.width")


# -------------------------------------------------------------------------------------------------------- the contracts


def draws(batch: TokenBatch) -> torch.Tensor:
    np.random.random()
    return chosen(batch, batch.entropy)


def remembers(batch: TokenBatch, seen: list[int] = []) -> torch.Tensor:  # noqa: B006
    seen.append(1)
    return chosen(batch, batch.entropy * len(seen))


def changes(batch: TokenBatch) -> torch.Tensor:
    return chosen(batch, batch.entropy.add_(1))


def first_of_all(batch: TokenBatch) -> torch.Tensor:
    return chosen(batch, batch.entropy * (torch.arange(len(batch.role)) < 40))


def coarse(batch: TokenBatch) -> torch.Tensor:
    return chosen(batch, ((batch.entropy + 1e6) - 1e6).clamp_min(0))


def idle(batch: TokenBatch, *, strength: float = 1.0, bias: int = 0, flat: bool = False) -> torch.Tensor:
    return chosen(batch, batch.entropy + strength * 0 + bias)


def of_the_piece(tokens: Any) -> torch.Tensor:
    return -tokens.logprob * (tokens.advantage - tokens.advantage.mean())


BROKEN: dict[str, tuple[str, Callable[..., Any], list[str]]] = {
    "generators": ("weight", draws, ["it draws from the global generator of numpy.random"]),
    "memory": ("weight", remembers, ["two calls on the same batch differ"]),
    "inputs": ("weight", changes, ["it changes batch.entropy"]),
    "order": ("weight", first_of_all, ["depends on the order of the trajectories"]),
    "precision": ("weight", coarse, ["float32 and float64 differ by up to"]),
    "settings": ("weight", idle, ["strength has no effect: 0, 0.5, 1.1, 2.5, 11 give what 1.0 gives"]),
    "pieces": ("surrogate", of_the_piece, ["depends on how the minibatch is cut into pieces"]),
}


@pytest.mark.parametrize("contract", BROKEN)
def test_a_broken_contract_is_named_and_no_other(contract: str, own: Any) -> None:
    slot, own.function, told = BROKEN[contract]
    (line,) = check_slot(slot, f"{MODULE}:function")
    assert line.startswith(f"{contract}: ")
    assert all(part in line for part in told)


def test_every_contract_is_broken_by_somebody() -> None:
    assert set(BROKEN) | {"form"} == set(CONTRACTS)


def policy_gradient(tokens: Any) -> torch.Tensor:
    return -tokens.logprob * tokens.advantage


SOUND: dict[str, Callable[..., Any]] = {
    "reward": lambda batch, *, c=0.1: batch.reward - chosen(batch, c * batch.entropy),
    "filter": lambda batch, *, least=0.1: batch.returns >= least,
    "advantage": lambda batch: chosen(batch, batch.returns[batch.trajectory]),
    "weight": lambda batch, *, strength=1.0: chosen(batch, 1 + strength * batch.entropy),
    "aggregation": lambda weight, trainable, trajectory: weight / weight.sum(),
    "surrogate": policy_gradient,
    "regulariser": lambda batch, *, bonus=0.1: torch.full_like(batch.entropy, bonus),
}


@pytest.mark.parametrize("slot", SECTIONS)
def test_a_sound_function_breaks_nothing(slot: str, own: Any) -> None:
    own.function = SOUND[slot]
    assert check_slot(slot, f"{MODULE}:function") == []


def test_the_worked_example_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    assert check_slot("weight", "unsure:weight", {"strength": 0.5}) == []


def test_the_suite_refuses_what_takes_no_function() -> None:
    with pytest.raises(UserError, match="slot: 'branching' takes no function; allowed: reward, filter"):
        check_slot("branching", "unsure:weight")
    with pytest.raises(UserError, match="function: 'unsure' is not allowed; allowed: module:name of a function"):
        check_slot("weight", "unsure")


@pytest.mark.parametrize("seed", range(BATCHES))
def test_trajectories_in_another_order_are_the_same_trajectories(seed: int) -> None:
    batch = made_up(seed)
    order = torch.randperm(batch.trajectories, generator=torch.Generator().manual_seed(seed))
    other, tokens = taken(batch, order)
    assert torch.equal(other.entropy, batch.entropy[tokens])
    assert torch.equal(order[other.trajectory], batch.trajectory[tokens])
    assert torch.equal(other.turn < 0, batch.turn[tokens] < 0)
    inside = other.turn >= 0
    assert torch.equal(other.turn_trajectory[other.turn[inside]], other.trajectory[inside])
    assert torch.equal(other.turn_state[other.turn[inside]], batch.turn_state[batch.turn[tokens][inside]])
    assert torch.equal(other.per_trajectory(other.reward), batch.per_trajectory(batch.reward)[order])
