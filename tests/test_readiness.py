"""Whether a policy is ready: what a small iteration shows, and what the whole is taken to cost."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from pipeline.analysis.readiness import Pace, Tried, facts, hours, peak_memory, try_environment, try_policy
from pipeline.model.policy import Policy
from pipeline.report.readiness import Checked, readiness_text
from pipeline.settings.params import Config
from tests.trainings import LAKE, configured, weights

PACE = Pace(sampled=1.0, annotated=0.5, updated=2.0)


def planned(workers: int, **changes: object) -> Config:
    return configured(
        {
            "rollout": {"groups": 4, "group_size": 4},
            "bottleneck": {"groups": 8},
            "train": {"iterations": 5, "passes": 2, "minibatch": 4, "validate_every": 2},
            "evaluation": {
                "states": 10, "rollouts": 3, "temperatures": [1.0, 0.5], "validation_states": 4, "validation_rollouts": 2,
            },
            "seeds": [0, 1, 2],
            "workers": workers,
            **changes,
        }
    )  # fmt: skip


def test_hours_are_those_of_every_episode_counted_one_by_one() -> None:
    """16 episodes an iteration; validations before, after 2, 4 and 5 iterations."""
    config = planned(1)
    iteration = 16 * (1.0 + 0.5 + 2 * 2.0)
    training = 5 * iteration + 4 * 8 * 1.0
    methods, matched = len(config.methods), sum(row.matched_to is not None for row in config.methods.values())
    warm = (
        sum(phase.steps for phase in config.policy.demonstrations.phases) * config.policy.demonstrations.batch_episodes
    )
    expected = {
        "policy": warm * 2.0,
        "table": 8 * 4 * 1.5,
        "matching": matched * 4 * 3 * 3 * iteration,  # of a search and what it is matched to: 3 seeds of 3 iterations
        "training": methods * 3 * training,
        "evaluation": ((1 + methods) * 3 * 2 + 3 * 2) * 30 * 1.0,
    }
    found = hours(config, {LAKE: PACE})
    assert found.keys() == expected.keys()
    assert [3600 * found[part] for part in expected] == pytest.approx(list(expected.values()))
    assert matched > 0


def test_what_several_processes_do_at_once_is_counted_in_rounds() -> None:
    alone, two, three = (hours(planned(workers), {LAKE: PACE}) for workers in (1, 2, 3))
    assert two["training"] == pytest.approx(alone["training"] * 2 / 3)
    assert three["training"] == pytest.approx(alone["training"] / 3)
    assert two["table"] == pytest.approx(alone["table"] / 2)
    both = hours(planned(1), {LAKE: PACE, "other": PACE})
    assert both["training"] == pytest.approx(2 * alone["training"])
    assert both["policy"] == pytest.approx(alone["policy"])


@pytest.fixture
def tried(policy: Policy) -> Tried:
    return try_environment(configured(), LAKE, Policy(copy.deepcopy(policy.model), policy.tokenizer))


def test_a_small_iteration_samples_annotates_and_updates(policy: Policy) -> None:
    own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    tried = try_environment(configured(), LAKE, own)
    assert tried.episodes.annotated
    assert len(tried.episodes) == 2 * min(8, configured().rollout.group_size)
    assert min(tried.pace.sampled, tried.pace.annotated, tried.pace.updated) > 0
    before, after = weights(policy.model), weights(own.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_facts_of_a_policy_are_those_of_its_files(policy: Policy) -> None:
    about, found = try_policy(configured(), lambda: Policy(copy.deepcopy(policy.model), policy.tokenizer))
    assert about == facts(policy, configured())
    assert list(found) == [LAKE]
    assert about["family"] == "qwen2"
    assert about["parameters"] == policy.model.num_parameters()
    assert about["dtype"] == "float32"
    assert about["token_bytes"] == 2 * 32 * 4  # keys and values of one layer of width 32
    assert not about["opens"]


def test_the_answer_comes_first_and_names_what_to_do(policy: Policy, tried: Tried) -> None:
    config = configured()
    episodes = tried.episodes

    def answer(valid: bool, ended: str, begun: bool = False) -> str:
        turns = {**episodes.turns, "ended": [ended] * len(episodes.turns["ended"])}
        turns |= {key: [valid] * len(turns[key]) for key in ("valid", "well_formed")}
        own = {**episodes.episodes, "return": [float(i % 2) for i in range(len(episodes))]}
        shown = replace(tried, episodes=replace(episodes, turns=turns, episodes=own))
        text = readiness_text(config, Checked("m", begun, facts(policy, config), {LAKE: shown}, peak_memory()))
        assert f"{LAKE}: of {len(turns['valid'])} turns " in text
        assert "; its own chat template" not in text
        return text.split("\n")[0]

    turns = len(episodes.turns["valid"])
    assert answer(True, "stop").startswith("ready: about ")
    assert answer(False, "stop") == (
        f"not ready: there is nothing to learn from ({LAKE}: 0 of {turns} turns are valid); give policy.demonstrations more steps"
    )
    assert "; raise response_tokens, and give " in answer(False, "response_tokens")
    assert answer(False, "stop", begun=True).startswith("before its warm start there is nothing to learn from (")
