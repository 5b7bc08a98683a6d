"""Heads beside the policy, and where the policy's gradient comes from, against full logits one sequence at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden
from pipeline.settings.heads import Critic, QFunction
from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.training import gradients, heads
from pipeline.training.gradients import gradient_share
from pipeline.training.heads import HEADS, Head, QHead, Scene, ValueHead, make_heads
from pipeline.training.module import PolicyGradient
from pipeline.training.tokens import TokenTable
from pipeline.trajectories.trajectory import REPORTED_ROLES, RESPONSE_ROLES, Role
from pipeline.workspace.yaml_files import read_yaml
from tests.trainings import standing, updated

ROOT = Path(__file__).parents[1]
VOCABULARY, WIDTH, TEMPERATURE = 23, 16, 0.8
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ("trunk", "model")
Kind = Any


def tiny_policy(seed: int = 0) -> Policy:
    """One random layer, with logits far from uniform."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            eos_token_id=0,
        )
    ).eval()
    return Policy(model, None)


@torch.no_grad()
def shaken(module: torch.nn.Module, seed: int, size: float = 0.2) -> None:
    """Noise on every parameter, so that no two networks are equal."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)


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


# --------------------------------------------------------------------------------------------------- in a training


def module_of(row: dict[str, Any]) -> PolicyGradient:
    """A training of a tiny policy that has moved away from its reference; no environment, no tokenizer."""
    changes = {
        "methods": {"tested": row},
        "rollout": {"temperature": TEMPERATURE},
        "train": {"tokens_per_forward": 40, "gradient_clip": 1e6},
    }
    config = parse(overlay(read_yaml(ROOT / "params.yaml"), changes))
    module = PolicyGradient(config, "frozen_lake", "tested", 0, tiny_policy())
    shaken(module.model, 1)
    shaken(module.heads, 2)
    return module


@dataclass(frozen=True)
class Example:
    """One trajectory; columns have a row per trainable token."""

    ids: np.ndarray
    trainable: np.ndarray
    columns: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.columns[name]

    def with_columns(self, **columns: Tensor) -> Example:
        return replace(self, columns=self.columns | columns)


def table_of(examples: Sequence[Example]) -> TokenTable:
    """The trajectories one after the other."""
    ids, trainable = (
        torch.from_numpy(np.concatenate([getattr(e, name) for e in examples])) for name in ("ids", "trainable")
    )
    lengths = torch.tensor([len(example.ids) for example in examples])
    columns = {name: torch.cat([e.columns[name] for e in examples]) for name in examples[0].columns}
    return TokenTable(lengths, {"ids": ids.long(), "trainable": trainable}).with_columns(**columns)


def some_examples(counts: Sequence[int], seed: int = 0, **heads: float) -> list[Example]:
    """One per count of trainable tokens, of all roles in turn, each after a token of an observation."""
    draws = np.random.default_rng(seed)
    examples = []
    for count in counts:
        ids = draws.integers(VOCABULARY, size=2 * count + 2).astype(np.int32)
        trainable = np.arange(len(ids)) % 2 == 1
        trainable[-1] = False

        def column(shift: float = 0.0, size: int = count) -> Tensor:
            return torch.from_numpy(shift + draws.standard_normal(size)).float()

        examples.append(
            Example(
                ids=ids,
                trainable=trainable,
                columns={
                    "role": torch.tensor([int(RESPONSE_ROLES[(t + len(examples)) % 5]) for t in range(count)]).long(),
                    "logprob_old": column(),
                    "ref_logprob": column(-3.0),
                    "advantage": column(),
                    "weight": column().abs(),
                    "entropy_terms": torch.zeros(count, 4),
                    "noise": torch.from_numpy(draws.random(count)).float(),
                    **{name: torch.full((count,), value) for name, value in heads.items()},
                },
            )
        )
    return examples


Row = dict[str, Any]
PPO: Row = {"surrogate": {"kind": "ppo_clip", "low": 0.2, "high": 0.28}}
KL_COV: Row = {"surrogate": {"kind": "covariance_kl", "share": 0.3, "coefficient": 2.0}}
ETPO: Row = {"advantage": {"kind": "soft_q", "q": {"kl_weight": 0.3}}, "surrogate": {"kind": "soft_q"}}


def distributions(module: PolicyGradient, policy: Policy, example: Example) -> Tensor:
    """Tempered log-probabilities over the vocabulary at the example's trainable tokens."""
    logits = policy.model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0]
    at = np.flatnonzero(example.trainable) - 1
    return torch.log_softmax(logits[at].float() / TEMPERATURE, -1)


def near(module: PolicyGradient, examples: list[Example], size: float) -> list[Example]:
    """The examples as if sampled by a policy not far from the module's."""
    result = []
    for example in examples:
        if len(example.role):
            with torch.no_grad():
                rows = distributions(module, module.policy, example)
            ids = torch.from_numpy(example.ids[example.trainable].astype(np.int64))
            now = rows[torch.arange(len(ids)), ids]
            example = example.with_columns(logprob_old=now + size * example.logprob_old)
        result.append(example)
    return result


Loss = Callable[[PolicyGradient, Example, int, Tensor, bool], Tensor]


def ppo_token(module: PolicyGradient, example: Example, t: int, logprob: Tensor, marked: bool) -> Tensor:
    ratio = torch.exp(logprob - example.logprob_old[t])
    advantage = float(example.advantage[t])
    held = min(max(float(ratio.detach()), 0.8), 1.28)
    if held * advantage < float(ratio.detach()) * advantage:
        return -held * advantage + 0.0 * ratio
    return -ratio * advantage


def kl_cov_token(module: PolicyGradient, example: Example, t: int, logprob: Tensor, marked: bool) -> Tensor:
    shift = logprob - example.logprob_old[t]
    return -torch.exp(shift) * example.advantage[t] + 2.0 * float(marked) * shift.abs()


def direct_norms(module: PolicyGradient, examples: list[Example], loss_of: Loss | None) -> list[list[float]]:
    """Norm of each token's gradient, from the full logits of its trajectory alone; None is ETPO's loss."""
    total_weight = math.fsum(float(w) for example in examples for w in example.weight)
    scored = []
    for example in examples:
        if len(example.role) == 0:
            scored.append((example, torch.zeros(0, VOCABULARY), []))
            continue
        rows = distributions(module, module.policy, example)
        tokens = example.ids[np.flatnonzero(example.trainable)].tolist()
        scored.append((example, rows, tokens))
    flat = [(i, t) for i, (example, _, _) in enumerate(scored) for t in range(len(example.role))]
    now = {(i, t): float(scored[i][1][t, scored[i][2][t]].detach()) for i, t in flat}
    gains = {(i, t): float(examples[i].advantage[t]) for i, t in flat}
    mean_now, mean_gain = math.fsum(now.values()) / len(flat), math.fsum(gains.values()) / len(flat)
    ranked = sorted(flat, key=lambda place: -(gains[place] - mean_gain) * (now[place] - mean_now))
    marked = set(ranked[: max(1, math.floor(0.3 * len(flat)))])
    parameters = list(module.model.parameters())
    norms = []
    for i, (example, rows, tokens) in enumerate(scored):
        own = []
        for t, token in enumerate(tokens):
            if loss_of is None:
                loss = soft_token(module, example, t, rows[t])
            else:
                loss = loss_of(module, example, t, rows[t, token], (i, t) in marked)
            factor = float(example.weight[t]) / total_weight
            slopes = torch.autograd.grad(factor * loss, parameters, retain_graph=True, allow_unused=True)
            own.append(math.sqrt(math.fsum(float(s.double().square().sum()) for s in slopes if s is not None)))
        norms.append(own)
    return norms


def soft_token(module: PolicyGradient, example: Example, t: int, log_pi: Tensor) -> Tensor:
    (head,) = module.heads
    assert isinstance(head, QHead)
    with torch.no_grad():
        log_ref = distributions(module, module.learner.reference, example)[t]
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        hidden = module.policy.backbone(input_ids=ids).last_hidden_state[0]
        q = head.head(hidden[np.flatnonzero(example.trainable)[t] - 1])
    total = torch.zeros(())
    for v in range(VOCABULARY):
        total = total + log_pi[v].exp() * (0.3 * (log_pi[v] - log_ref[v]) - q[v])
    return total


def shares_of(examples: list[Example], norms: list[list[float]]) -> dict[str, float]:
    sums: dict[str, float] = dict.fromkeys(REPORTED_ROLES, 0.0)
    for example, own in zip(examples, norms, strict=True):
        for role, norm in zip(example.role.tolist(), own, strict=True):
            (name,) = [name for name, roles in REPORTED_ROLES.items() if role in roles]
            sums[name] += norm
    total = math.fsum(sums.values())
    return {f"measured_gradient_share_{name}": value / total for name, value in sums.items()}


@pytest.mark.parametrize(("row", "loss_of"), [(PPO, ppo_token), (KL_COV, kl_cov_token), (ETPO, None)])
def test_gradient_shares_equal_those_of_every_token(
    row: Row, loss_of: Loss | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sample that holds everything; the model's own gradients are left alone."""
    monkeypatch.setattr(gradients, "TRAJECTORIES", 1000)
    monkeypatch.setattr(gradients, "TOKENS_PER_ROLE", 1000)
    module = module_of(row)
    examples = near(module, some_examples((6, 3, 1, 9)), 0.3)
    expected = shares_of(examples, direct_norms(module, examples, loss_of))
    first, *others = module.model.parameters()
    kept = first.grad = torch.full_like(first, 3.0)
    actual = gradient_share(module.learner, table_of(examples), np.random.default_rng(0))
    assert actual == pytest.approx(expected, rel=1e-3)
    assert sum(actual.values()) == pytest.approx(1.0)
    assert min(actual.values()) > 0.001
    assert first.grad is kept
    assert bool((kept == 3.0).all())
    assert all(p.grad is None for p in [*others, *module.heads.parameters()])


def test_gradient_shares_of_a_sample_are_estimates_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of each of two roles: the role's number of tokens times that token's norm, whichever was drawn."""
    monkeypatch.setattr(gradients, "TOKENS_PER_ROLE", 1)
    module, (example,) = module_of(PPO), some_examples((6,))
    roles = torch.tensor([int(Role.ACTION)] * 2 + [int(Role.REASONING)] * 4)
    (example,) = near(module, [example.with_columns(role=roles, advantage=-roles.float())], 0.05)
    (norms,) = direct_norms(module, [example], ppo_token)
    possible = [2 * a / (2 * a + 4 * r) for a in norms[:2] for r in norms[2:]]
    assert min(abs(x - y) for x in possible for y in possible if x is not y) > 1e-4
    drawn = set()
    for seed in range(12):
        actual = gradient_share(module.learner, table_of([example]), np.random.default_rng(seed))
        assert actual == gradient_share(module.learner, table_of([example]), np.random.default_rng(seed))
        action = actual["measured_gradient_share_action"]
        (which,) = [i for i, share in enumerate(possible) if share == pytest.approx(action, abs=2e-5)]
        drawn.add(which)
        assert actual["measured_gradient_share_reasoning"] == pytest.approx(1 - action)
        assert actual["measured_gradient_share_tag"] == actual["measured_gradient_share_other"] == 0.0
    assert len(drawn) > 2


def test_gradient_shares_look_at_so_many_trajectories_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module, examples = module_of(PPO), some_examples((0, 30, 30, 30, 30, 30, 30))
    seen: list[Tensor] = []

    def norm(model: torch.nn.Module, loss: Tensor) -> float:
        seen.append(loss)
        return 1.0

    monkeypatch.setattr(gradients, "_norm", norm)
    shares = gradient_share(module.learner, table_of(examples), np.random.default_rng(3))
    everyone = torch.cat([e.role for e in examples])
    for name, roles in REPORTED_ROLES.items():
        expected = sum(int((everyone == role).sum()) for role in roles) / len(everyone)
        assert shares[f"measured_gradient_share_{name}"] == pytest.approx(expected)
    assert len(seen) in (4 * 5 * 4, 3 * 5 * 4)  # the empty trajectory may be one of the four


def test_without_any_gradient_there_are_no_shares() -> None:
    module, examples = module_of(PPO), some_examples((5,))
    still = table_of(examples).with_columns(advantage=torch.zeros(5))
    assert set(gradient_share(module.learner, still, np.random.default_rng(0)).values()) == {0.0}


def test_an_update_trains_q_and_its_target_follows() -> None:
    """In a training with soft_q: the optimizer holds what is trained, and each step ends with a Polyak average."""
    row = {**ETPO, "advantage": {"kind": "soft_q", "q": {"kl_weight": 0.3, "polyak": 0.75}}}
    module = standing(module_of(row))
    (head,) = module.heads
    assert isinstance(head, QHead)
    optimizer: Any = module.optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [*module.model.parameters(), *head.head.parameters()]
    assert held == {id(p) for p in trained}
    before, policy = copy.deepcopy(head), [p.detach().clone() for p in module.model.parameters()]
    examples = some_examples((6, 3, 9), q_target=1.0, q_mask=1.0, taken=0.0, soft_value=0.0)
    assert updated(module, table_of(examples))["q_gradient_norm"] > 0
    assert not torch.equal(head.head.weight, before.head.weight)
    expected = 0.75 * before.target_head.weight + 0.25 * head.head.weight
    torch.testing.assert_close(head.target_head.weight, expected)
    assert all(not torch.equal(p, old) for p, old in zip(module.model.parameters(), policy, strict=True))
