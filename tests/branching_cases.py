"""Params, policies and trees for tests of branching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.environments import make
from pipeline.environments.playing import reset, step
from pipeline.rollout.episode import Episode
from pipeline.rollout.forest import branches_by_role
from pipeline.rollout.specs import EpisodeSpec
from pipeline.settings.params import Config, Environment
from pipeline.trajectories.parsing import decode, token_roles
from pipeline.trajectories.trajectory import Trajectories
from tests.forests import (
    rows,
)
from tests.test_collector import NAME, TOKENIZER


def owner(table: list[dict[str, Any]], parents: np.ndarray, episode: int, token: int) -> int:
    """The episode that sampled a token of an episode."""
    while table[episode]["split"] is not None and token < table[episode]["split"]:
        episode = int(parents[episode])
    return episode


def assert_forest(
    made: Trajectories, changed: Config, specs: Sequence[EpisodeSpec], tokenizer: Any = TOKENIZER
) -> None:
    """Budgets are met, every branch is a continuation of an earlier episode, every token was sampled once."""
    table, parents, section = rows(made), made.parents, changed.environments[NAME]
    assert made.episodes["episode_id"] == [spec.episode_id for spec in specs]
    assert made.episodes["group_id"] == [spec.group_id for spec in specs]
    assert len(made) == changed.rollout.groups * changed.rollout.group_size
    sampled_by = set()
    for e, row in enumerate(table):
        assert len(row["input_ids"]) <= section.context_tokens
        assert row["policy_version"] == 3
        assert len(row["turns"]) <= section.max_turns
        for turn in row["turns"]:
            assert turn["end"] - turn["start"] <= section.response_tokens
            own = slice(turn["start"], turn["end"])
            assert turn["ended"] != "response_tokens" or turn["end"] - turn["start"] == section.response_tokens
            assert turn["ended"] != "context_tokens" or turn["end"] == section.context_tokens
            ended = turn["ended"] in ("stop", "eos")
            whole = token_roles(decode(tokenizer, row["input_ids"][own].tolist()), ended)
            np.testing.assert_array_equal(row["role"][own], whole)
        if row["split"] is None:
            assert parents[e] == -1
            assert row["parent"] is None
        else:
            assert_branch(row, table[parents[e]])
            assert parents[e] < e
        for token in np.flatnonzero(row["sampled"]).tolist():
            first = owner(table, parents, e, token)
            assert row["trainable"][token] == (first == e)
            sampled_by.add((first, token))
        assert not (row["trainable"] & ~row["sampled"]).any()
        root = next(spec for spec in specs if spec.episode_id == table[owner(table, parents, e, 0)]["episode_id"])
        assert_happened(row, section, root)
    assert int(made.trainable.sum()) == len(sampled_by)
    by_role = branches_by_role(made)
    assert sum(by_role.values()) == (parents >= 0).sum()


def assert_branch(row: dict[str, Any], parent: dict[str, Any]) -> None:
    split = row["split"]
    assert row["parent"] == parent["episode_id"]
    assert row["group_id"] == parent["group_id"]
    assert (parent["split"] or 0) < split < len(parent["input_ids"])
    assert parent["sampled"][split]
    assert row["sampled"][split]
    for name in ("input_ids", "sampled", "logprob", "entropy"):
        np.testing.assert_array_equal(row[name][:split], parent[name][:split])
    over = [turn for turn in parent["turns"] if turn["end"] <= split]
    assert row["turns"][: len(over)] == over
    assert row["turns"][len(over)]["start"] == parent["turns"][len(over)]["start"]
    assert row["turns"][len(over)]["state_key"] == parent["turns"][len(over)]["state_key"]


def assert_happened(row: dict[str, Any], section: Environment, root: EpisodeSpec) -> None:
    """Its actions, from the root's seeds, have these results."""
    environment = make(section)
    reset(environment, root.noise, root.state_seed)
    assert row["state_key"] == environment.state_key
    for turn in row["turns"]:
        assert turn["state_key"] == environment.state_key
        reward = step(environment, turn["action"])[1] if turn["valid"] else section.format_penalty
        assert turn["reward"] == reward
    assert row["return"] == pytest.approx(sum(turn["reward"] for turn in row["turns"]))
    assert row["success"] == environment.success


def branch_of(parent: Episode, split: int) -> Episode:
    name = f"branch at {split}"
    spec = EpisodeSpec(name, parent.spec.group_id, 0, 0, 0, 0, (0, "tokens", name))
    return Episode.branch(parent, spec, split)
