"""Controls of ActFocus's weights, and the constant normaliser."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import coefficients, token_weights
from pipeline.objective.weights import (
    actfocus_weights,
    signal_values,
)
from pipeline.settings.weight import (
    ActFocusWeight,
)
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role
from tests.batches import batches, method, noise, population, properties, section, sigmoid
from tests.weight_cases import assert_weights, line, trainable_tokens


def focused(batch: TokenBatch, **settings: Any) -> torch.Tensor:
    return actfocus_weights(batch, section(ActFocusWeight, **settings))


# ------------------------------------------------------------------------------------------- controls of ActFocus


DEFAULTS: dict[str, Any] = {
    "reasoning_downweight": 0.1,
    "redistribution_strength": 0.5,
    "redistribution_temperature": 2.0,
    "signal": "reference_energy",
}


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
@given(batches())
@properties
def test_focus_on_reasoning_is_the_mirror_image(form: str, batch: TokenBatch) -> None:
    """Where actions and reasoning change places, it gives what the method gives."""
    swapped = {Role.ACTION: Role.REASONING, Role.REASONING: Role.ACTION}
    mirrored = replace(batch, role=torch.tensor([int(swapped.get(Role(r), r)) for r in batch.role.tolist()]))
    actual = focused(batch, **DEFAULTS, form=form, focus="reasoning")
    assert torch.equal(actual, focused(mirrored, **DEFAULTS, form=form))


@properties
@given(batches())
def test_focus_on_reasoning_equals_reference(batch: TokenBatch) -> None:
    energy = {t: float(batch.energy[t]) for t in trainable_tokens(batch) if int(batch.role[t]) == Role.REASONING}
    mean, variance = population(list(energy.values())) if energy else (0.0, 0.0)
    expected = {}
    for t in trainable_tokens(batch):
        role = int(batch.role[t])
        if role == Role.REASONING:
            expected[t] = 1 + 0.5 * sigmoid((energy[t] - mean) / math.sqrt(variance + 1e-8) / 2)
        else:
            expected[t] = 1.0 if role == Role.ANSWER_TAG else 0.1
    slot = {"kind": "actfocus", "redistribution_temperature": 2.0, "focus": "reasoning"}
    assert_weights(token_weights(method(weight=slot), batch), expected)


@properties
@given(batches(), st.sampled_from([Role.ACTION, Role.REASONING]))
def test_shuffled_energy_is_a_reproducible_permutation(batch: TokenBatch, role: Role) -> None:
    """The k-th token of the focus has the energy of the one whose noise is the k-th smallest."""
    focus = batch.of(role)
    actual = signal_values(batch, "shuffled_energy", focus)
    own = [t for t in trainable_tokens(batch) if int(batch.role[t]) == role]
    energy, draws = batch.energy.tolist(), batch.noise.tolist()
    sources = sorted(own, key=lambda t: draws[t])
    assert [float(actual[t]) for t in own] == [energy[t] for t in sources]
    assert sorted(actual[focus].tolist()) == sorted(energy[t] for t in own)
    assert torch.equal(actual[~focus], batch.energy[~focus])
    assert torch.equal(actual, signal_values(batch, "shuffled_energy", focus))
    reversed_order = signal_values(replace(batch, noise=1 - batch.noise), "shuffled_energy", focus)
    assert [float(reversed_order[t]) for t in own] == [energy[t] for t in reversed(sources)]


@properties
@given(batches())
def test_weights_by_shuffled_energy_are_the_methods_on_other_tokens(batch: TokenBatch) -> None:
    """The control keeps the weights' distribution; with the noise in the energies' order it is no shuffle at all."""
    action = batch.of(Role.ACTION)
    plain = focused(batch, **DEFAULTS, form="sigmoid")
    shuffled = focused(batch, **DEFAULTS | {"signal": "shuffled_energy"}, form="sigmoid")
    assert sorted(shuffled[action].tolist()) == pytest.approx(sorted(plain[action].tolist()), abs=1e-9)
    torch.testing.assert_close(shuffled[~action], plain[~action])
    in_order = replace(batch, noise=torch.arange(len(batch.role)) / len(batch.role))
    unmoved = focused(in_order, **DEFAULTS | {"signal": "shuffled_energy"}, form="sigmoid")
    torch.testing.assert_close(unmoved, plain)


def test_another_noise_is_another_shuffle() -> None:
    batch = line([Role.ACTION] * 8, energy=[float(e) for e in range(8)])
    orders = set()
    for seed in range(5):
        noisy = replace(batch, noise=noise(batch, seed))
        orders.add(tuple(signal_values(noisy, "shuffled_energy", noisy.of(Role.ACTION)).tolist()))
    assert len(orders) == 5


# ---------------------------------------------------------------------------------------------------- aggregation


@properties
@given(batches(), st.sampled_from([1.0, 12.5, 192.0]))
def test_the_constant_normaliser_divides_by_trajectories_and_a_constant(batch: TokenBatch, tokens: float) -> None:
    """However many tokens were sampled, and whatever they weigh."""
    weights = torch.where(batch.trainable, noise(batch).abs(), 0.0)
    row = method(aggregation={"kind": "constant", "tokens": tokens})
    owners = []
    for owner, chosen in zip(batch.trajectory.tolist(), batch.trainable.tolist(), strict=True):
        if chosen and owner not in owners:
            owners.append(owner)
    expected = {t: float(weights[t]) / (len(owners) * tokens) for t in trainable_tokens(batch)}
    assert_weights(coefficients(row, weights, batch.trainable, batch.trajectory), expected)


def test_the_constant_normaliser_does_not_blame_long_responses_less() -> None:
    row = method(aggregation={"kind": "constant", "tokens": 10.0})
    for count in (1, 4, 9):
        batch = line([RESPONSE_ROLES[t % 5] for t in range(count)])
        factors = coefficients(row, batch.trainable.double(), batch.trainable, batch.trajectory)
        assert factors.tolist() == pytest.approx([0.0] + [0.1] * count)
