"""KL(before || after) of an update, against sums over the vocabulary written out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.model.policy import Policy
from pipeline.settings.params import Config
from pipeline.training.module import PolicyGradient
from pipeline.training.tokens import TokenTable
from pipeline.training.update_kl import TOKENS, TRAJECTORIES, UpdateKL, first_updates, kl_divergence, measures_update_kl
from pipeline.trajectories.trajectory import Role
from pipeline.workspace.randomness import generator
from tests.trainings import LAKE, configured, fit, standing, unmoved, updated


def training(config: Config, policy: Policy, method: str = "grpo") -> PolicyGradient:
    return PolicyGradient(config, LAKE, method, 0, Policy(copy.deepcopy(policy.model), policy.tokenizer))


def fast(**changes: Any) -> Config:
    return configured({"method_defaults": {"learning_rate": 1e-3}, **changes})


def distributions(policy: Policy, table: TokenTable, temperature: float) -> list[list[float]]:
    """Of every trainable token what the policy predicts there, by running each trajectory alone."""
    found = []
    for e in range(len(table)):
        ids, trainable = (table.select([e]).columns[name] for name in ("ids", "trainable"))
        with torch.no_grad():
            logits = policy.model(input_ids=ids[None]).logits[0, :-1].double() / temperature
        found += torch.log_softmax(logits, -1)[trainable[1:]].tolist()
    return found


def by_hand(before: list[list[float]], after: list[list[float]], role: list[int], wanted: Role) -> float:
    rows = [(p, q) for p, q, own in zip(before, after, role, strict=True) if own == wanted]
    return math.fsum(math.exp(a) * (a - b) for p, q in rows for a, b in zip(p, q, strict=True)) / len(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_iterations_kl_is_the_mean_over_its_updates_of_each_ones_own(policy: Policy, temperature: float) -> None:
    config = fast(rollout={"temperature": temperature})
    measured = training(config, policy)
    module = training(config, policy)
    iteration = unmoved(module)
    table, role = iteration.table, iteration.table["role"].tolist()
    assert len(table) <= TRAJECTORIES
    assert role.count(Role.REASONING) <= TOKENS
    standing(module)
    before, found = distributions(module.policy, table, temperature), {Role.ACTION: [], Role.REASONING: []}
    for rows in iteration.minibatches:
        updated(module, table.select(rows))
        after = distributions(module.policy, table, temperature)
        for wanted, values in found.items():
            values.append(by_hand(before, after, role, wanted))
        before = after
    row = fit(measured, 1).curve[0]
    assert len(iteration.minibatches) == row["updates"] == 4
    for name, wanted in {"action": Role.ACTION, "reasoning": Role.REASONING}.items():
        assert row[f"kl_update_{name}"] == pytest.approx(np.mean(found[wanted]), rel=1e-3)
        assert row[f"kl_update_{name}"] > 1e-6


def test_small_differences_keep_their_digits() -> None:
    """Of logits that differ by 1e-4 the KL is about 1e-9, of which float32 would leave nothing."""
    draws = torch.Generator().manual_seed(0)
    before = 3 * torch.randn(5, 400, generator=draws)
    after = before + 1e-4 * torch.randn(5, 400, generator=draws)
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    variance = (p * (q.log() - p.log()) ** 2).sum(-1) - ((p * (q.log() - p.log())).sum(-1)) ** 2
    assert kl_divergence(before, after).tolist() == pytest.approx((variance / 2).tolist(), rel=1e-3)
    assert kl_divergence(before, before).tolist() == [0.0] * 5


def test_all_updates_are_measured_on_the_same_few_tokens_of_each_role(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.update_kl.TRAJECTORIES", 3)
    monkeypatch.setattr("pipeline.training.update_kl.TOKENS", 2)
    module = training(fast(train={"tokens_per_forward": 64}), policy)
    iteration = unmoved(module)
    one, again, other = (UpdateKL(module.learner, iteration.table, generator(0, name)) for name in ("a", "a", "b"))
    standing(module)
    found = []
    for rows in iteration.minibatches[:2]:
        updated(module, iteration.table.select(rows))
        found.append([watched.after_update() for watched in (one, again, other)])
    for first, second, third in found:
        assert first == second
        assert first != third
        assert first.keys() == {"kl_update_action", "kl_update_reasoning"}


def test_it_is_measured_where_the_policy_begins_to_learn_and_with_validations(policy: Policy) -> None:
    critic = {"kind": "trunk", "learning_rate": 1e-3, "warmup_iterations": 2}
    method = {"advantage": {"kind": "gae", "critic": critic}}
    config = fast(train={"iterations": 11, "validate_every": 4}, methods={"warm": method})
    for name, measured in {"grpo": [0, 1, 2, 3, 7, 11], "warm": [2, 3, 4, 7, 11]}.items():
        learner = training(config, policy, name).learner
        assert [i for i in range(12) if measures_update_kl(learner, i)] == measured
    curve = fit(training(config, policy, "warm"), 4).curve
    assert ["kl_update_action" in row for row in curve] == [False, False, True, True]
    assert first_updates(curve) == [row["kl_update_action"] for row in curve[2:]]
    rows = [{"kl_update_action": float(i)} if i != 1 else {} for i in range(9)]
    assert first_updates(rows) == [0.0, 2.0, 3.0]
