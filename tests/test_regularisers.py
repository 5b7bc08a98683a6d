"""The entropy terms of every token over several iterations, and their loss with its gradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective import methods
from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import entropy_terms
from pipeline.objective.regularisers import EntropyTerms, entropy_band, entropy_loss, entropy_target, fixed
from pipeline.settings.method import Method
from pipeline.settings.regulariser import EntropyBand, EntropyTarget, FixedRegulariser
from pipeline.trajectories.trajectory import Role
from tests.batches import CLOSE, batches, method, noise, properties, section, unbranched

KINDS = [kind for kind in methods.REGULARISERS if kind != "custom"]
PATHS = st.lists(batches(), min_size=3, max_size=4)


def row(kind: str, **settings: Any) -> Method:
    return method(regulariser={"kind": kind, **settings})


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def four_trajectories(entropy: list[float], success: list[bool]) -> TokenBatch:
    """Two groups of two trajectories, each a prompt and one token with this entropy."""
    zeros = torch.zeros(8, dtype=torch.float64)
    column = zeros.clone()
    column[1::2] = torch.tensor(entropy, dtype=torch.float64)
    return TokenBatch(
        role=torch.tensor([int(Role.PROMPT), int(Role.ACTION)] * 4),
        trainable=torch.tensor([False, True] * 4),
        trajectory=torch.arange(4).repeat_interleave(2),
        turn=torch.tensor([-1, 0, -1, 1, -1, 2, -1, 3]),
        turn_trajectory=torch.arange(4),
        turn_state=torch.zeros(4, dtype=torch.long),
        group=torch.tensor([0, 0, 1, 1]),
        success=torch.tensor(success),
        returns=torch.zeros(4, dtype=torch.float64),
        reward=zeros,
        logprob=zeros,
        entropy=column,
        energy=zeros,
        ref_logprob=zeros,
        ref_entropy=zeros,
        noise=zeros,
        **unbranched(4),
    )


# --------------------------------------------------------------------------------------------------------- fixed


@properties
@given(batches(), st.sampled_from([0.0, 0.001, 2.0]))
def test_fixed_is_the_same_bonus_everywhere_and_no_band(batch: TokenBatch, entropy: float) -> None:
    for terms, state in (
        fixed(batch, {}, section(FixedRegulariser, entropy=entropy)),
        entropy_terms(row("fixed", entropy=entropy), batch, {"old": 1.0}),
    ):
        n = len(batch.role)
        close(terms.bonus, [entropy] * n)
        close(terms.penalty, [0.0] * n)
        close(entropy_loss(batch.entropy, terms), [-entropy * h for h in batch.entropy.tolist()])
        assert state == {}


# ---------------------------------------------------------------------------------------------------------- band


@properties
@given(
    PATHS,
    st.sampled_from([0.001, 2.0]),
    st.sampled_from([(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)]),
    st.sampled_from([2, 7, 150]),
)
def test_entropy_band_equals_reference_over_iterations(
    path: list[TokenBatch], entropy: float, band: tuple[float, float], steps: int
) -> None:
    """One history of all turns, of whole iterations, the present one not among them; beta falls from 2 to 1."""
    history: list[float] = []
    state: dict[str, float] = {}
    for number, drawn in enumerate(path):
        batch = replace(drawn, iteration=number)
        n, beta = len(batch.role), 1 + math.exp(-3 * number / math.floor(steps / 2))
        penalty, low, high = [0.0] * n, [-math.inf] * n, [math.inf] * n
        for t, chosen in enumerate(batch.trainable.tolist()):
            if history and chosen:
                mean = math.fsum(history) / len(history)
                penalty[t], low[t], high[t] = entropy * beta * 0.3, band[0] * mean, band[1] * mean
        before = dict(state)
        settings = section(EntropyBand, entropy=entropy, alpha=0.3, steps=steps, low=band[0], high=band[1])
        terms, following = entropy_band(batch, state, settings)
        close(terms.bonus, [entropy] * n)
        close(terms.penalty, penalty)
        close(terms.low, low)
        close(terms.high, high)
        assert state == before
        state = following
        now = [h for h, chosen in zip(batch.entropy.tolist(), batch.trainable.tolist(), strict=True) if chosen]
        if now:
            history.append(math.fsum(now) / len(now))


def test_golden_entropy_band() -> None:
    """Iterations of 1, 2 and 9 nats: bands around 1, and around their mean of 1.5; beta is 1 + e^-3 and 1 + e^-6 at K = 2."""
    state: dict[str, float] = {}
    slots = row("entropy_band", entropy=0.5, alpha=0.2, steps=2, low=0.5, high=2.0)
    for number, entropy, penalty, low, high in (
        (0, 1.0, 0.0, -math.inf, math.inf),
        (1, 2.0, 0.1049787, 0.5, 2.0),
        (2, 9.0, 0.1002479, 0.75, 3.0),
    ):
        batch = replace(four_trajectories([entropy] * 4, [True] * 4), iteration=number)
        terms, state = entropy_terms(slots, batch, state)
        for column, value in ((terms.penalty, penalty), (terms.low, low), (terms.high, high)):
            assert column[batch.trainable].tolist() == pytest.approx([value] * 4, abs=1e-6)
        assert terms.penalty[~batch.trainable].tolist() == [0.0] * 4


def test_golden_epo_loss_and_slope() -> None:
    """EPO's at K = 150 after one iteration of 1 nat: -0.001 (H - 1.9608 * 0.1 * P), P = H - 2 above 2 nats and 0 below."""
    _, state = entropy_terms(row("entropy_band"), four_trajectories([1.0] * 4, [True] * 4))
    entropies = [0.0, 1.5, 2.0, 3.0]
    batch = replace(four_trajectories(entropies, [True] * 4), iteration=1)
    terms, _ = entropy_terms(row("entropy_band"), batch, state)
    h = batch.entropy.clone().requires_grad_(True)
    loss = entropy_loss(h, terms)[batch.trainable]
    (slope,) = torch.autograd.grad(loss.sum(), h)
    share = 0.1 * (1 + math.exp(-3 / 75))
    assert loss.tolist() == pytest.approx([0.0, -0.0015, -0.002, -0.003 + 0.001 * share], abs=1e-9)
    inside, outside = slope[batch.trainable].tolist()[1], slope[batch.trainable].tolist()[3]
    assert (inside, outside) == pytest.approx((-0.001, -0.001 * (1 - share)))


# -------------------------------------------------------------------------------------------------------- target


@properties
@given(PATHS, st.sampled_from([0.0, 0.05, 1.0]), st.sampled_from([0.1, 2.0]), st.sampled_from([0.0, 1.5]))
def test_entropy_target_equals_reference_over_iterations(
    path: list[TokenBatch], entropy: float, rate: float, hardness: float
) -> None:
    state: dict[str, float] = {}
    first = coefficient = None
    for batch in path:
        chosen = [h for h, t in zip(batch.entropy.tolist(), batch.trainable.tolist(), strict=True) if t]
        mean = math.fsum(chosen) / len(chosen) if chosen else 0.0
        first = mean if first is None else first
        coefficient = entropy if coefficient is None else coefficient + rate * (0.9 * first - mean)
        coefficient = coefficient if not state else min(0.2, max(0.0, coefficient))
        bonus = []
        for owner in batch.trajectory.tolist():
            group = batch.group.tolist()
            failed = [not s for s, g in zip(batch.success.tolist(), group, strict=True) if g == group[owner]]
            bonus.append(coefficient * (1 + hardness * sum(failed) / len(failed)))
        before = dict(state)
        settings = {"target": 0.9, "rate": rate, "largest": 0.2, "hardness": hardness}
        terms, following = entropy_target(batch, state, section(EntropyTarget, entropy=entropy, **settings))
        close(terms.bonus, bonus)
        close(terms.penalty, [0.0] * len(bonus))
        assert state == before
        state = following
        assert state == pytest.approx({"first_entropy": first, "coefficient": coefficient}, abs=1e-9)


def test_golden_entropy_target() -> None:
    """Target 0.5 of 2, rate 0.1, within 0 and 0.05, from 0.01; group 0 has succeeded, half of group 1.

    0.01; + 0.1 * (1 - 0.8) = 0.03; + 0.1 * (1 - 0) = 0.13, held at 0.05; + 0.1 * (1 - 1.2) = 0.03; below 0, held at 0.
    """
    settings = {"entropy": 0.01, "target": 0.5, "rate": 0.1, "largest": 0.05, "hardness": 2.0}
    state: dict[str, float] = {}
    for entropy, coefficient in ((2.0, 0.01), (0.8, 0.03), (0.0, 0.05), (1.2, 0.03), (9.0, 0.0), (0.9, 0.01)):
        batch = four_trajectories([entropy] * 4, [True, True, False, True])
        terms, state = entropy_terms(row("entropy_target", **settings), batch, state)
        expected = [coefficient] * 2 + [coefficient * 2] * 2
        assert terms.bonus[batch.trainable].tolist() == pytest.approx(expected, abs=1e-9)


@properties
@given(batches())
def test_harder_groups_have_a_larger_bonus(batch: TokenBatch) -> None:
    settings = {"entropy": 0.01, "target": 0.8, "rate": 0.01, "largest": 0.05}
    bonus = entropy_target(batch, {}, section(EntropyTarget, hardness=1.0, **settings))[0].bonus.tolist()
    group, success = batch.group.tolist(), batch.success.tolist()
    by_rate: dict[float, set[float]] = {}
    for t, owner in enumerate(batch.trajectory.tolist()):
        members = [s for s, g in zip(success, group, strict=True) if g == group[owner]]
        by_rate.setdefault(members.count(False) / len(members), set()).add(bonus[t])
    assert all(len(own) == 1 for own in by_rate.values())
    ordered = [next(iter(by_rate[rate])) for rate in sorted(by_rate)]
    assert all(easier < harder for easier, harder in itertools.pairwise(ordered))


# ---------------------------------------------------------------------------------------------------------- loss


@properties
@given(batches())
def test_entropy_loss_equals_reference_with_gradient(batch: TokenBatch) -> None:
    """Outside the band the slope is the penalty's, inside it nothing but the bonus's; half of the bands are open."""
    entropy = noise(batch, 1).abs().requires_grad_(True)
    open_ended = noise(batch, 2) > 0
    middle, width = noise(batch, 3).abs(), noise(batch, 4).abs()
    terms = EntropyTerms(
        bonus=noise(batch, 5).abs(),
        penalty=noise(batch, 6).abs(),
        low=torch.where(open_ended, -math.inf, middle - width),
        high=torch.where(open_ended, math.inf, middle + width),
    )
    loss = entropy_loss(entropy, terms)
    (gradient,) = torch.autograd.grad(loss.sum(), entropy)
    columns = zip(entropy.tolist(), *(column.tolist() for column in terms), strict=True)
    losses, slopes = [], []
    for h, bonus, penalty, low, high in columns:
        if h < low:
            losses.append(penalty * (low - h) - bonus * h)
            slopes.append(-penalty - bonus)
        elif h > high:
            losses.append(penalty * (h - high) - bonus * h)
            slopes.append(penalty - bonus)
        else:
            losses.append(-bonus * h)
            slopes.append(-bonus)
    close(loss.detach(), losses)
    close(gradient, slopes)


@pytest.mark.parametrize(
    ("entropy", "loss", "slope"), [(0.5, 0.03, -0.1), (0.79, 0.001, -0.1), (1.0, 0.0, 0.0), (1.5, 0.03, 0.1)]
)
def test_golden_band_loss(entropy: float, loss: float, slope: float) -> None:
    """A band of 0.8 to 1.2 and 0.1 per nat outside it; the descent goes back to the band."""
    h = torch.tensor([entropy], dtype=torch.float64, requires_grad=True)
    column = torch.ones(1, dtype=torch.float64)
    actual = entropy_loss(h, EntropyTerms(0 * column, 0.1 * column, 0.8 * column, 1.2 * column))
    (gradient,) = torch.autograd.grad(actual.sum(), h)
    assert actual.item() == pytest.approx(loss, abs=1e-9)
    assert gradient.item() == pytest.approx(slope)


@pytest.mark.parametrize("kind", KINDS)
@given(PATHS)
@properties
def test_every_choice_gives_terms_with_a_finite_loss_and_state_that_can_be_kept(
    kind: str, path: list[TokenBatch]
) -> None:
    """All but the ends of open bands are finite, over iterations."""
    state: dict[str, float] = {}
    for batch in path:
        terms, state = entropy_terms(row(kind, entropy=0.01), batch, state)
        entropy = batch.entropy.clone().requires_grad_(True)
        loss = entropy_loss(entropy, terms)
        (gradient,) = torch.autograd.grad(loss.sum(), entropy)
        assert bool(torch.isfinite(loss).all() & torch.isfinite(gradient).all())
        assert all(type(value) is float and math.isfinite(value) for value in state.values())


@pytest.mark.parametrize("kind", KINDS)
@given(batches())
@properties
def test_entropies_of_tokens_that_are_not_trainable_are_not_read(kind: str, batch: TokenBatch) -> None:
    spoilt = replace(batch, entropy=torch.where(batch.trainable, batch.entropy, 7.0))
    terms, state = entropy_terms(row(kind, entropy=0.01), batch)
    again, same = entropy_terms(row(kind, entropy=0.01), spoilt)
    assert state == same
    for actual, expected in zip(again, terms, strict=True):
        assert torch.equal(actual, expected)
