"""Heads beside the policy, and where the policy's gradient comes from, against full logits one sequence at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden
from pipeline.settings.heads import Critic, QFunction
from pipeline.training import heads
from pipeline.training.heads import HEADS, Head, QHead, Scene, ValueHead, make_heads
from tests.head_cases import TEMPERATURE, VOCABULARY, shaken, tiny_policy

SINGLE = {"rtol": 1e-4, "atol": 1e-5}


KINDS = ("trunk", "model")


Kind = Any


def some_scene(policy: Policy, reference: Policy) -> Scene:
    """Three sequences of 4 to 9 tokens, about half of which are wanted."""
    draws = np.random.default_rng(0)
    ids = [draws.integers(VOCABULARY, size=n).astype(np.int32) for n in (7, 4, 9)]
    wanted = [draws.random(len(i)) < 0.5 for i in ids]
    for mask in wanted:
        mask[0], mask[-1] = False, True
    return Scene(policy, reference, TEMPERATURE, ids, wanted, predicting_hidden(policy, ids, wanted))


@pytest.fixture
def scene() -> Scene:
    """A policy that has moved away from its reference."""
    reference = tiny_policy()
    policy = Policy(copy.deepcopy(reference.model), None)
    shaken(policy.model, 1)
    return some_scene(policy, reference.frozen_copy())


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of logits at a time."""
    monkeypatch.setattr(heads, "LOGITS_PER_CHUNK", 3 * 4 * VOCABULARY)


def states(scene: Scene, trunk: torch.nn.Module) -> list[Tensor]:
    """A trunk's hidden states that predict the wanted tokens: each sequence alone, through the model's own forward."""
    rows: list[Tensor] = []
    for ids, wanted in zip(scene.sequences, scene.wanted, strict=True):
        everything = trunk(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        rows += [everything[t - 1] for t in np.flatnonzero(wanted)]
    return rows


def logits_of(scene: Scene, policy: Policy) -> list[Tensor]:
    """The full logits that predict the wanted tokens, likewise."""
    rows: list[Tensor] = []
    for ids, wanted in zip(scene.sequences, scene.wanted, strict=True):
        everything = policy.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        rows += [everything[t - 1] for t in np.flatnonzero(wanted)]
    return rows


def chosen_tokens(scene: Scene) -> list[int]:
    return [
        int(i) for ids, wanted in zip(scene.sequences, scene.wanted, strict=True) for i in ids[np.flatnonzero(wanted)]
    ]


def critic(scene: Scene, kind: Kind, **settings: Any) -> ValueHead:
    head = ValueHead("value", Critic(kind=kind, **settings), scene.reference)
    shaken(head, 2)
    return head


def q_function(scene: Scene, kind: Kind, **settings: Any) -> QHead:
    """Online and target networks that differ, as they do in the middle of a training."""
    head = QHead("q", QFunction(kind=kind, kl_weight=0.3, **settings), scene.reference)
    shaken(head, 2)
    return head


def trunk_of(head: Head, scene: Scene) -> torch.nn.Module:
    return scene.policy.backbone if head.trunk is None else head.trunk


def assert_same_gradients(actual: Tensor, expected: Tensor, head: Head, scene: Scene) -> dict[str, bool]:
    """By all parameters of head, policy and reference; which of them have one, by name."""
    named = {f"head.{n}": p for n, p in head.named_parameters()}
    named |= {f"policy.{n}": p for n, p in scene.policy.model.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    assert not any(p.requires_grad for p in scene.reference.model.parameters())
    ours, theirs = (torch.autograd.grad(x, list(named.values()), allow_unused=True) for x in (actual, expected))
    reached = {}
    for name, one, other in zip(named, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, **SINGLE, msg=lambda text, name=name: f"{name}: {text}")
        reached[name] = one is not None and bool(one.any())
    return reached


# --------------------------------------------------------------------------------------------------- value functions


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_linear_in_the_trunks_hidden_state(scene: Scene, kind: Kind) -> None:
    head = critic(scene, kind)
    with torch.no_grad():
        estimate = head.estimate(scene)
        weight, bias = head.head.weight[0].tolist(), float(head.head.bias)
        expected = [
            math.fsum(w * x for w, x in zip(weight, state.tolist(), strict=True)) + bias
            for state in states(scene, trunk_of(head, scene))
        ]
    assert list(estimate) == ["value"]
    torch.testing.assert_close(estimate["value"], torch.tensor(expected), **SINGLE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_critic_says_zero_and_has_the_references_trunk(scene: Scene, kind: Kind) -> None:
    (head,) = make_heads({"returns": Critic(kind=kind)}, scene.reference)
    assert isinstance(head, ValueHead)
    assert head.estimate(scene)["returns"].tolist() == [0.0] * len(scene.hidden)
    assert all(p.requires_grad for p in head.parameters())
    if kind == "model":
        assert head.trunk is not None
        pairs = list(zip(head.trunk.parameters(), scene.reference.backbone.parameters(), strict=True))
        assert all(torch.equal(own, theirs) and own is not theirs for own, theirs in pairs)
    else:
        assert head.trunk is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_trunk", [True, False])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_and_its_gradient_equal_a_loop(
    scene: Scene, kind: Kind, train_trunk: bool, clip: float | None
) -> None:
    """``0.5 (V - R)^2``, with clipping the larger of that and the loss of the held value."""
    head, n = critic(scene, kind, clip=clip), len(scene.hidden)
    with torch.no_grad():
        before = head.estimate(scene)["value"] + torch.linspace(-0.7, 0.7, n)
        target = head.estimate(scene)["value"] + torch.sin(3.0 * torch.arange(n))
    losses = head.loss(scene, {"value": before, "value_target": target}, train_trunk)
    expected, held_back = [], 0
    for t, state in enumerate(states(scene, trunk_of(head, scene))):
        read = state.detach() if kind == "trunk" and not train_trunk else state
        value = (read * head.head.weight[0]).sum() + head.head.bias[0]
        loss = 0.5 * (value - target[t]) ** 2
        if clip is not None:
            moved = float((value - before[t]).detach())
            held = value if abs(moved) <= clip else before[t] + math.copysign(clip, moved)
            other = 0.5 * (held - target[t]) ** 2
            if abs(moved) > clip and float(other.detach()) > float(loss.detach()):
                loss, held_back = other, held_back + 1
        expected.append(loss)
    assert (clip is None) == (held_back == 0)
    assert held_back < n
    torch.testing.assert_close(losses, torch.stack(expected), **SINGLE)
    weight = torch.linspace(0.5, 2, n)
    reached = assert_same_gradients((weight * losses).sum(), (weight * torch.stack(expected)).sum(), head, scene)
    assert reached["head.head.weight"]
    assert reached["head.head.bias"]
    by_policy = any(hit for name, hit in reached.items() if name.startswith("policy."))
    assert by_policy == (kind == "trunk" and train_trunk)
    assert any(hit for name, hit in reached.items() if name.startswith("head.trunk.")) == (kind == "model")


def test_every_kind_of_settings_has_its_head(scene: Scene) -> None:
    assert {Critic: ValueHead, QFunction: QHead} == HEADS
    made = make_heads({"value": Critic(), "entropy_value": Critic(), "q": QFunction()}, scene.reference)
    assert [(type(head), head.name) for head in made] == [
        (ValueHead, "value"),
        (ValueHead, "entropy_value"),
        (QHead, "q"),
    ]


# ----------------------------------------------------------------------------------------------------------------- Q


def tempered(logits: Sequence[float]) -> list[float]:
    grown = [math.exp((x - max(logits)) / TEMPERATURE) for x in logits]
    return [x / math.fsum(grown) for x in grown]


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_of_q_equal_full_logits(scene: Scene, kind: Kind) -> None:
    """``taken`` is the online network's; ``soft_value`` is sum_v pi Q_target - b KL(pi || ref)."""
    head = q_function(scene, kind)
    with torch.no_grad():
        estimate = head.estimate(scene)
        followed = scene.policy.backbone if head.target_trunk is None else head.target_trunk
        columns = zip(
            logits_of(scene, scene.policy),
            logits_of(scene, scene.reference),
            states(scene, trunk_of(head, scene)),
            states(scene, followed),
            chosen_tokens(scene),
            strict=True,
        )
        taken, soft = [], []
        for own, ref, read, follow, token in columns:
            taken.append(float((head.head.weight[token] * read).sum() + head.head.bias[token]))
            pi, base = tempered(own.tolist()), tempered(ref.tolist())
            value = 0.0
            for v in range(VOCABULARY):
                q = float((head.target_head.weight[v] * follow).sum() + head.target_head.bias[v])
                value += pi[v] * (q - 0.3 * math.log(pi[v] / base[v]))
            soft.append(value)
    assert set(estimate) == {"taken", "soft_value"}
    torch.testing.assert_close(estimate["taken"], torch.tensor(taken), **SINGLE)
    torch.testing.assert_close(estimate["soft_value"], torch.tensor(soft), **SINGLE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_q_knows_the_kl_alone(scene: Scene, kind: Kind) -> None:
    head = QHead("q", QFunction(kind=kind, kl_weight=0.5), scene.reference)
    with torch.no_grad():
        estimate = head.estimate(scene)
        pairs = zip(logits_of(scene, scene.policy), logits_of(scene, scene.reference), strict=True)
        kl = []
        for own, ref in pairs:
            pi, base = tempered(own.tolist()), tempered(ref.tolist())
            kl.append(math.fsum(p * math.log(p / b) for p, b in zip(pi, base, strict=True)))
    assert estimate["taken"].tolist() == [0.0] * len(kl)
    torch.testing.assert_close(estimate["soft_value"], -0.5 * torch.tensor(kl), **SINGLE)
    assert min(kl) > 0.01


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("kind", KINDS)
def test_the_soft_objective_reaches_the_policy_and_not_q(scene: Scene, kind: Kind) -> None:
    """Its gradient is that of sum_v pi (b log(pi / ref) - Q) from the full logits, Q a number."""
    head = q_function(scene, kind)
    objective = head.soft_objective(scene)
    rows = zip(
        logits_of(scene, scene.policy),
        logits_of(scene, scene.reference),
        states(scene, trunk_of(head, scene)),
        strict=True,
    )
    expected = []
    for own, ref, read in rows:
        pi, base = torch.softmax(own / TEMPERATURE, -1), torch.softmax(ref / TEMPERATURE, -1).detach()
        total = torch.zeros(())
        for v in range(VOCABULARY):
            q = float(((head.head.weight[v] * read).sum() + head.head.bias[v]).detach())
            total = total + pi[v] * (0.3 * (pi[v].log() - base[v].log()) - q)
        expected.append(total)
    torch.testing.assert_close(objective, torch.stack(expected), **SINGLE)
    weight = torch.linspace(-0.5, 1, len(expected))
    reached = assert_same_gradients((weight * objective).sum(), (weight * torch.stack(expected)).sum(), head, scene)
    assert reached["policy.lm_head.weight"]
    assert reached["policy.model.embed_tokens.weight"]
    assert not any(hit for name, hit in reached.items() if name.startswith("head."))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_trunk", [True, False])
def test_the_loss_of_q_and_its_gradient_equal_a_loop(scene: Scene, kind: Kind, train_trunk: bool) -> None:
    """Huber: quadratic up to delta, linear beyond; by the rows of the head that were taken, and by the trunk."""
    head, n = q_function(scene, kind, huber_delta=0.4), len(scene.hidden)
    with torch.no_grad():
        target = head.estimate(scene)["taken"] + torch.linspace(-1.0, 1.0, n)
    losses = head.loss(scene, {"q_target": target}, train_trunk)
    expected, far = [], 0
    for t, (state, token) in enumerate(zip(states(scene, trunk_of(head, scene)), chosen_tokens(scene), strict=True)):
        read = state.detach() if kind == "trunk" and not train_trunk else state
        error = target[t] - (read * head.head.weight[token]).sum() - head.head.bias[token]
        size = abs(float(error.detach()))
        far += size > 0.4
        expected.append(0.5 * error**2 if size <= 0.4 else 0.4 * (error.abs() - 0.2))
    assert 0 < far < n
    torch.testing.assert_close(losses, torch.stack(expected), **SINGLE)
    reached = assert_same_gradients(losses.sum(), torch.stack(expected).sum(), head, scene)
    assert reached["head.head.weight"]
    assert reached["head.head.bias"]
    assert not any(name.startswith("head.target") for name in reached)
    by_policy = any(hit for name, hit in reached.items() if name.startswith("policy."))
    assert by_policy == (kind == "trunk" and train_trunk)
    assert any(hit for name, hit in reached.items() if name.startswith("head.trunk.")) == (kind == "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("polyak", [0.0, 0.9, 0.995, 1.0])
def test_after_a_step_the_target_is_the_polyak_average(scene: Scene, kind: Kind, polyak: float) -> None:
    """Two steps, in float64: every target parameter is polyak of itself and the rest of the online one."""
    head = q_function(scene, kind, polyak=polyak).double()
    pairs = list(zip(head.target_head.parameters(), head.head.parameters(), strict=True))
    if head.trunk is not None:
        assert head.target_trunk is not None
        pairs += list(zip(head.target_trunk.parameters(), head.trunk.parameters(), strict=True))
    assert 2 * len(pairs) == len(list(head.parameters()))
    for step in range(2):
        for online in (head.head, head.trunk):
            if online is not None:
                shaken(online, 10 + step)
        before = [(slow.detach().clone(), fast.detach().clone()) for slow, fast in pairs]
        assert not any(torch.equal(slow, fast) for slow, fast in before)
        head.after_step()
        for (slow, fast), (old, new) in zip(pairs, before, strict=True):
            torch.testing.assert_close(slow.detach(), polyak * old + (1 - polyak) * new, rtol=0, atol=1e-14)
            assert torch.equal(fast.detach(), new)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_start_as_copies_and_are_not_trained(scene: Scene, kind: Kind) -> None:
    head = QHead("q", QFunction(kind=kind), scene.reference)
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    still = {name for name, p in head.named_parameters() if not p.requires_grad}
    assert all(name.startswith(("head.", "trunk.")) for name in trained)
    assert still == {f"target_{name}" for name in trained}
    everything = dict(head.named_parameters())
    assert all(torch.equal(everything[f"target_{name}"], everything[name]) for name in trained)
    shaken(head.head, 5)
    assert not bool(head.target_head.weight.any())
