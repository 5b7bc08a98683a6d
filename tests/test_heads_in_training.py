"""Heads beside the policy in real trainings."""

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

from pipeline.model.policy import Policy
from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.training import gradients
from pipeline.training.gradients import gradient_share
from pipeline.training.heads import QHead
from pipeline.training.module import PolicyGradient
from pipeline.training.tokens import TokenTable
from pipeline.trajectories.trajectory import REPORTED_ROLES, RESPONSE_ROLES, Role
from pipeline.workspace.yaml_files import read_yaml
from tests.head_cases import TEMPERATURE, VOCABULARY, shaken, tiny_policy
from tests.trainings import standing, updated

ROOT = Path(__file__).parents[1]


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
    monkeypatch.setattr(gradients, "TOKENS_PER_ROLE", 1000)
    module = module_of(row)
    everything = module.config.train.model_copy(update={"gradient_trajectories": 1000})
    learner = replace(module.learner, config=module.config.model_copy(update={"train": everything}))
    examples = near(module, some_examples((6, 3, 1, 9)), 0.3)
    expected = shares_of(examples, direct_norms(module, examples, loss_of))
    first, *others = module.model.parameters()
    kept = first.grad = torch.full_like(first, 3.0)
    actual = gradient_share(learner, table_of(examples), np.random.default_rng(0))
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
