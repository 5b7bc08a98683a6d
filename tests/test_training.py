"""Training in this process: bootstrap, one iteration, the update, learning, and pretrained policies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.bootstrap.scratch import bootstrap
from pipeline.environments import split_of
from pipeline.evaluation.evaluate import evaluate
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.settings.params import Config
from pipeline.settings.presets import overlay
from pipeline.training.module import PolicyGradient
from pipeline.training.tokens import TokenTable
from pipeline.training.update import Learner, averages
from pipeline.trajectories.trajectory import Role
from tests.letters import LETTER
from tests.training_cases import prepared, token_number
from tests.trainings import LAKE, configured, fit, same, standing, supervised, updated, weights

# ------------------------------------------------------------------------------------------------------------ bootstrap


def test_a_bootstrapped_policy_is_reproducible_and_reloads(policy: Policy, directory: Path) -> None:
    losses: list[float] = []
    config = configured()
    assert config.policy.kind == "scratch"
    again = bootstrap(config.policy, config.environments, lambda step, total, loss: losses.append(loss))
    assert len(losses) == 60
    assert losses[-1] < 0.7 * losses[0]
    assert not again.model.training
    assert same(weights(again.model), weights(policy.model))
    text = "<think>player at 0 1</think><answer>Left</answer> √"
    assert again.tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    assert policy.tokenizer.decode(policy.tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([policy.tokenizer(text)["input_ids"]])
    assert torch.equal(again.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_a_policys_rotary_base_is_the_one_that_was_set_also_when_it_was_saved(policy: Policy, tmp_path: Path) -> None:
    slow = supervised(configured({"policy": {"rope_theta": 1e6}}))
    slow.save(tmp_path / "slow")
    for made, base in ((policy, 1e4), (slow, 1e6), (load_policy(str(tmp_path / "slow")), 1e6)):
        pairs = torch.arange(8) / 8  # heads are 16 wide
        torch.testing.assert_close(made.model.model.rotary_emb.inv_freq, base**-pairs)


# ------------------------------------------------------------------------------------------------------------ an update


@pytest.mark.parametrize("method", ["grpo", "ppo_actfocus", "planned"])
def test_gradient_accumulation_is_exact(policy: Policy, method: str) -> None:
    """With plain SGD at rate 1 the parameters' difference is the gradients'; Adam would hide a factor.

    ``planned``: trajectories leave the mean, and what the others then weigh is of the whole minibatch.
    """
    trained, pieces = {}, {}
    rows = {"planned": {"surrogate": {"kind": "procedure_clip", "dual": 1.1, "half_life": 4.0}}}
    whole = configured({"methods": rows})
    for budget in (64, 1_000_000):
        config = configured({"train": {"tokens_per_forward": budget}, "methods": rows})
        module = PolicyGradient(config, LAKE, method, 0, Policy(copy.deepcopy(policy.model), policy.tokenizer))
        standing(module, torch.optim.SGD(module.parameters(), lr=1.0))
        scored: list[int] = []

        def counted(
            learner: Any,
            piece: TokenTable,
            *rest: Any,
            loss: Callable[..., Any] = Learner.loss,
            scored: list[int] = scored,
        ) -> Any:
            scored.append(len(piece))
            return loss(learner, piece, *rest)

        table = prepared(whole, method, policy, token_number if len(module.heads) else None).table
        table = table.with_columns(logprob_old=table["logprob_old"] + 0.4 * (0.5 - table["noise"]))
        if method == "planned":
            planned = module.learner.planned(table)
            assert {bool(planned.select([e])["plan"].any()) for e in range(len(table))} == {True, False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "loss", counted)
            assert updated(module, table)["gradient_norm"] > 0
        trained[budget], pieces[budget] = weights(module), scored
    assert pieces == {64: [1] * 8, 1_000_000: [8]}
    moved = max(
        float((trained[64][n] - w).abs().max())
        for n, w in weights(PolicyGradient(config, LAKE, method, 0, policy)).items()
    )
    assert moved > 1e-3
    for name, value in trained[64].items():
        torch.testing.assert_close(value, trained[1_000_000][name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_update_is_skipped_and_counted(policy: Policy, bad: float) -> None:
    module = standing(PolicyGradient(configured(), LAKE, "grpo", 0, policy))
    good = prepared(module.config, "grpo", policy).table
    spoilt = good.with_columns(advantage=torch.where(good.trajectory == 0, bad, good["advantage"]))
    before, first = weights(module.model), updated(module, spoilt)
    assert same(weights(module.model), before)
    assert first == {"non_finite_losses": 1.0, "skipped_steps": 0.0}
    both = averages([first, updated(module, good)])
    after = weights(module.model)
    assert not same(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert both["non_finite_losses"] == 1.0
    assert np.isfinite(list(both.values())).all()


def critic_config(**settings: Any) -> Config:
    return configured({"methods": {"ppo": {"advantage": {"critic": {"learning_rate": 0.01, **settings}}}}})


@pytest.mark.parametrize("kind", ["trunk", "model"])
def test_a_critic_learns_its_targets(policy: Policy, kind: str) -> None:
    config = critic_config(kind=kind)
    module = standing(PolicyGradient(config, LAKE, "ppo", 0, policy))
    assert (module.heads[0].trunk is not None) == (kind == "model")
    table = prepared(config, "ppo", policy, token_number).table
    table = table.with_columns(value_target=(table["role"] == Role.ACTION).float())
    losses = [updated(module, table)["value_loss"] for _ in range(30)]
    assert losses[-1] < 0.4 * losses[0]  # whether an answer will be closed, and so be an action, cannot all be known


@pytest.mark.parametrize("kind", ["trunk", "model"])
def test_while_the_critic_warms_up_the_policy_stands_still(policy: Policy, kind: str) -> None:
    module = standing(PolicyGradient(critic_config(kind=kind, warmup_iterations=2), LAKE, "ppo", 0, policy))
    table = prepared(module.config, "ppo", policy, token_number).table
    before, critic = weights(module.model), weights(module.heads)
    for iteration in (0, 1):  # the head starts at zero: no gradient would reach a shared trunk before the second
        updated(module, table, iteration)
    assert same(weights(module.model), before)
    assert not same(weights(module.heads), critic)
    updated(module, table, 2)
    assert not same(weights(module.model), before)


# ------------------------------------------------------------------------------------------------------------- training


def test_two_equal_trainings_are_equal_and_the_reference_stays_frozen(policy: Policy) -> None:
    before = weights(policy.model)
    runs = []
    for _ in range(2):
        own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        module = fit(PolicyGradient(configured(), LAKE, "ppo_actfocus", 0, own), 2)
        assert same(weights(module.learner.reference.model), before)
        runs.append((weights(module.model), module.curve))
    assert same(runs[0][0], runs[1][0])
    assert not same(runs[0][0], before)
    assert runs[0][1] == runs[1][1]
    assert [row["iteration"] for row in runs[0][1]] == [0, 1]
    assert runs[0][1][0]["recompute_error"] < 1e-4
    assert [row["updates"] for row in runs[0][1]] == [4, 4]


def letter_config(changes: dict[str, Any] | None = None, **settings: Any) -> Config:
    phases = [{"steps": 150, "reasoning_words": [0, 1], "action_noise": 0.0}]
    toy = {
        "environments": {LAKE: None, "letter": {**LETTER, "settings": settings}},
        "policy": {"demonstrations": {"phases": phases}},
        "rollout": {"groups": 4, "group_size": 8},
        "train": {"minibatch": 16, "iterations": 10},
        "methods": {"grpo": {"learning_rate": 3e-3}},
    }
    return configured(overlay(toy, changes or {}))


def test_grpo_learns_which_letter_is_rewarded() -> None:
    config = letter_config()
    module = fit(PolicyGradient(config, "letter", "grpo", 0, supervised(config)), 10)
    first, last = module.curve[0], module.curve[-1]
    assert first["valid_action_rate"] > 0.9
    assert 0.25 < first["success"] < 0.75
    assert last["success"] > 0.9
    module.result()
    played = evaluate(module.engine, module.policy.tokenizer, config, "letter", 0, 1.0)
    assert np.mean(played.episodes["success"]) > 0.9
    assert {split_of(key) for key in played.episodes["state_key"]} == {"test"}


def test_an_iteration_without_a_group_to_learn_from_is_survived() -> None:
    """Nobody is ever rewarded, every group's returns are equal, and the filter keeps none."""
    config = letter_config({"methods": {"grpo": {"filter": {"kind": "reward_variance"}}}}, rewarded="C")
    policy = supervised(config)
    before = weights(policy.model)
    module = fit(PolicyGradient(config, "letter", "grpo", 0, policy), 2)
    assert same(weights(module.model), before)
    for row in module.curve:
        assert (row["kept_trajectories"], row["updates"], row["episodes"], row["zero_variance_groups"]) == (0, 0, 32, 4)
    assert len(module.curve) == 2
