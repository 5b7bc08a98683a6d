"""Branching rollouts: what grows, whether branches are what they claim to be, what they cost, and trainings on them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.energy.annotate import score_trajectories
from pipeline.model.policy import Policy
from pipeline.progress.timing import Phases
from pipeline.rollout.branch_scores import omega
from pipeline.rollout.forest import Forest
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.branching import Positions
from pipeline.settings.params import Config
from pipeline.training.collection import Collection
from pipeline.training.module import PolicyGradient
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import TrainingTask, training_task
from pipeline.trajectories.table import read, to_table
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json
from tests.trainings import LAKE, configured, fit, left, quiet

# ------------------------------------------------------------------------------------------------------ real trainings


METHODS: dict[str, Any] = {
    "arpo": {
        "branching": {"kind": "entropy_rise", "initial": 2, "base": 0.5, "penalty": 0.0},
        "advantage": {"kind": "shared_prefix"},
    },
    "appo": {
        "branching": {"kind": "positions", "initial": 2},
        "advantage": {"kind": "prefix_credit"},
        "surrogate": {"kind": "procedure_clip"},
    },
    "seea_r1": {
        "branching": {"kind": "tree_search", "width": 2},
        "advantage": {"kind": "siblings"},
    },
    "random": {
        "branching": {"kind": "positions", "initial": 2, "signal": "random"},
        "advantage": {"kind": "shared_prefix"},
    },
    "starts": {
        "branching": {"kind": "positions", "initial": 2, "signal": "action_start", "side": "before"},
        "advantage": {"kind": "siblings"},
    },
    "switch": {
        "branching": {"kind": "temperature_switch", "initial": 2, "target": 9.0, "high": 2.0},
        "advantage": {"kind": "reinforced"},
    },
}


def branching_config(changes: dict[str, Any] | None = None) -> Config:
    train = {"minibatch": 4, "passes": 2, "iterations": 3, "validate_every": 100}
    return configured({"methods": METHODS, "train": train, **(changes or {})})


def collection_of(policy: Policy, method: str, changed: Config) -> Collection:
    return Collection(
        changed,
        LAKE,
        0,
        changed.methods[method].branching,
        TransformersEngine(policy, changed.rollout.batch_episodes),
        policy,
        policy.frozen_copy(),
        Phases(),
    )


def rounds_of(collection: Collection, number: int) -> Iterator[Trajectories]:
    """The annotated episodes of each of an iteration's rounds."""
    return map(collection.annotate, collection.collect(number))


def test_appos_omega_is_one_before_an_update_and_another_after_it(policy: Policy) -> None:
    changed = branching_config()
    (table,) = rounds_of(collection_of(policy, "grpo", changed), 0)

    def leads() -> np.ndarray:
        now = score_trajectories(policy, table, 1.0, 4096)[0]
        return omega(table, now - table.logprob, Positions(kind="positions", discount=0.99))

    policy.model.eval()
    np.testing.assert_allclose(leads(), 1, atol=1e-5)
    fit(PolicyGradient(changed, LAKE, "grpo", 0, policy), 1)
    policy.model.eval()
    assert np.abs(leads() - 1).max() > 1e-3


def test_appo_updates_on_its_initial_episodes_then_samples_its_branches_and_updates_on_both(policy: Policy) -> None:
    """Of 2 states 2 initial and 2 further episodes each: one minibatch of initial episodes, three times."""
    module = fit(PolicyGradient(branching_config(), LAKE, "appo", 0, policy), 1)
    assert module.curve[0]["updates"] == 3
    assert module.curve[0]["recompute_error"] < 1e-4
    made = module.last_episodes
    assert made is not None
    assert made.ref_logprob is not None
    assert (made.parents >= 0).tolist() == [False, False, True, True] * 2
    moved, branch = np.abs(made.logprob - made.ref_logprob), (made.parents >= 0)[made.token_episode]
    assert moved[~branch].max() < 1e-4  # by the reference policy
    assert moved[branch & ~made.trainable].max() < 1e-4
    assert moved[branch & made.trainable].max() > 1e-3  # by the policy after the first of these updates
    assert np.median(moved[branch & made.trainable & made.sampled]) > 1e-5


def test_rounds_of_a_collection(policy: Policy) -> None:
    """Where the policy has to move first the initial episodes come first, and again among all."""
    for method in METHODS:
        found = list(rounds_of(collection_of(policy, method, branching_config()), 1))
        assert [len(episodes) for episodes in found] == ([4, 8] if method == "appo" else [8])
        assert all(episodes.annotated for episodes in found)
        assert set(found[-1].episodes["iteration"]) == {1}
        if method == "appo":
            again = found[1].select([e for e, parent in enumerate(found[1].parents) if parent < 0])
            assert to_table(again).equals(to_table(found[0]))


def test_branches_after_an_update_are_sampled_by_the_policy_as_it_is_then(policy: Policy) -> None:
    """Nothing of their prefixes is left that the policy before it has computed."""
    rounds = rounds_of(collection_of(policy, "appo", branching_config()), 0)
    next(rounds)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.9)
    made = next(rounds)
    policy.model.eval()
    now = score_trajectories(policy, made, 1.0, 4096)[0]
    own = made.trainable & (made.parents >= 0)[made.token_episode]
    assert own.any()
    np.testing.assert_allclose(made.logprob[own], now[own], atol=1e-4)
    assert np.abs(made.logprob - now)[~own].max() > 0.01


@pytest.mark.parametrize("method", ["random", "starts"])
def test_scores_of_a_group_do_not_depend_on_other_groups(policy: Policy, method: str) -> None:
    """The same state beside one other and beside three: its branches begin at the same places."""
    few = branching_config()
    many = branching_config({"rollout": {"groups": 4}, "bottleneck": {"groups": 4}})
    tables = [list(rounds_of(collection_of(policy, method, changed), 0))[-1] for changed in (few, many)]
    places = [list(zip(table.episodes["parent"], table.episodes["split"], strict=True))[:8] for table in tables]
    assert places[0] == places[1]
    assert any(split for _, split in places[0])


def test_what_was_sampled_at_another_temperature_is_trained_on_at_the_rollouts(policy: Policy) -> None:
    changed = branching_config()
    collection = collection_of(policy, "switch", changed)
    (sampled,) = rounds_of(collection, 0)
    assert sampled.episodes["temperature"] == [1.0, 1.0, 2.0, 2.0] * 2
    trained = collection.rescored(sampled)
    policy.model.eval()
    logprob, entropy, _ = score_trajectories(policy, sampled, 1.0, 4096)
    np.testing.assert_allclose(trained.logprob, logprob, atol=1e-4)
    np.testing.assert_allclose(trained.entropy, entropy, atol=1e-4)
    hot = (np.array(sampled.episodes["temperature"]) == 2.0)[sampled.token_episode]
    assert np.abs(sampled.logprob - logprob)[hot].max() > 0.1
    np.testing.assert_array_equal(trained.logprob[~hot], sampled.logprob[~hot])
    module = fit(PolicyGradient(changed, LAKE, "switch", 0, policy), 1)
    assert module.curve[0]["recompute_error"] < 1e-4
    assert module.last_episodes is not None
    assert to_table(module.last_episodes).equals(to_table(sampled))


# ------------------------------------------------------------------------------------------------- killed and run again


def killed_within_a_tree(task: TrainingTask) -> None:
    """Dies when the second iteration asks for the episodes after the initial ones."""
    wave = Forest.wave

    def fatal(forest: Forest) -> Trajectories | None:
        if forest.trees[0].specs[0].iteration == 1 and forest.trees[0].episodes:
            os.kill(os.getpid(), signal.SIGKILL)
        return wave(forest)

    Forest.wave = fatal  # type: ignore[method-assign]
    train_one(TrainingJob(task, None, None), quiet)


@pytest.mark.parametrize("method", ["arpo", "appo", "seea_r1"])
def test_a_training_killed_within_a_tree_ends_in_the_bytes_of_an_uninterrupted_one(
    method: str, directory: Path, tmp_path: Path
) -> None:
    """With appo between the update on the initial episodes and their branches."""
    changed = branching_config({"train": {**branching_config().train.model_dump(), "iterations": 2}})
    straight, killed = (
        training_task(changed, LAKE, method, 0, directory, tmp_path / name) for name in ("straight", "killed")
    )
    process = multiprocessing.get_context("fork").Process(target=killed_within_a_tree, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not killed.finished
    train_one(TrainingJob(killed, None, None), quiet)
    assert (killed.cache / "begun.log").read_text().split() == ["0", "1", "1"]
    train_one(TrainingJob(straight, None, None), quiet)
    assert left(killed.result) == left(straight.result)
    assert {"curves.json", "episodes.parquet", "policy/model.safetensors"} <= {*left(straight.result)}
    assert len(read_json(straight.result / "curves.json")) == 2
    made = read(straight.result / "episodes.parquet")
    assert (made.parents >= 0).any()
    assert set(made.episodes["iteration"]) == {1}


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("branching", "said"),
    [
        ({"kind": "positions", "initial": 4}, ".branching.initial: 4 episodes of rollout.group_size (4); at most 3"),
        ({"kind": "positions", "initial": 2, "width": 4}, ".branching.width: 4 episodes of rollout.group_size (4)"),
        ({"kind": "entropy_rise", "initial": 5}, ".branching.initial: 5 episodes of rollout.group_size (4); at most 4"),
        ({"kind": "tree_search", "width": 5}, ".branching.width: 5 episodes of rollout.group_size (4); at most 4"),
        (
            {"kind": "entropy_rise", "initial": 2, "monitor_slope": 0.7},
            "monitor_slope has no effect while initial is a number",
        ),
        (
            {"kind": "entropy_rise", "initial": 2, "penalty": 0, "penalty_per": "prompt"},
            "penalty_per has no effect while penalty is 0",
        ),
        (
            {"kind": "positions", "initial": 2, "signal": "entropy", "discount": 0.5, "bounds": [0.5, 2.0]},
            "discount, bounds has no effect while signal is entropy",
        ),
        ({"kind": "positions", "initial": 2, "bounds": [1.1, 1.2]}, "bounds must be two numbers, low < 1 < high"),
        ({"kind": "tree_search", "width": 1}, ".branching.width: "),
        ({"kind": "thicket"}, ".branching.kind: 'thicket' is not known"),
        ({"kind": "none", "initial": 2}, ".branching.initial: unknown key"),
    ],
)
def test_branchings_that_cannot_be_are_refused_in_a_line(branching: dict[str, Any], said: str) -> None:
    assert said in refusal({"branching": branching, "advantage": {"kind": "shared_prefix"}})


@pytest.mark.parametrize("key", ["high", "low"])
def test_a_temperature_must_be_another_one(key: str) -> None:
    branching = {"kind": "temperature_switch", "initial": 2, key: 1.0}
    said = refusal({"branching": branching, "advantage": {"kind": "reinforced"}})
    assert said == f"params.yaml: methods.made.branching.{key}: 1.0 is rollout.temperature; choose another"


SWITCH = {"kind": "temperature_switch", "initial": 2}


RISE = {"kind": "entropy_rise", "initial": 2}


@pytest.mark.parametrize(
    ("slots_of", "said"),
    [
        (
            {"branching": SWITCH, "advantage": {"kind": "group"}},
            "temperature_switch and advantage reinforced go together",
        ),
        (
            {"branching": RISE, "advantage": {"kind": "reinforced"}},
            "temperature_switch and advantage reinforced go together",
        ),
        ({"advantage": {"kind": "siblings"}}, "advantage siblings needs branches, and branching is none"),
        ({"advantage": {"kind": "prefix_credit"}}, "advantage prefix_credit needs branches, and branching is none"),
        ({"branching": RISE, "advantage": {"kind": "prefix_credit"}}, "prefix_credit needs branching positions"),
        ({"branching": RISE, "advantage": {"kind": "turn_gae"}}, "advantage turn_gae is not defined on branches"),
        ({"branching": RISE, "reward": {"kind": "sequence_entropy"}}, "is not defined on branches"),
        (
            {"branching": RISE, "advantage": {"kind": "gated_progress"}},
            "advantage gated_progress is not defined on branches",
        ),
    ],
)
def test_what_is_not_defined_on_trees_is_refused_in_a_line(slots_of: dict[str, Any], said: str) -> None:
    assert said in refusal(slots_of)


def refusal(method: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        configured({"methods": {"made": method}})
    message = str(caught.value)
    assert message.startswith("params.yaml: methods.made")
    assert "\n" not in message
    return message
