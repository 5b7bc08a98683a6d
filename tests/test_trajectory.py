"""The trajectory type: through Parquet and back, selection, rewards on tokens, and files that cannot be used."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.table import read, write
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories, TrajectoryError, concatenate
from tests.trajectory_cases import ANNOTATIONS, assert_equal, one_episode, properties, tables

TOKEN_COLUMNS = ("input_ids", "role", "sampled", "logprob", "entropy")


# ----------------------------------------------------------------------------------------- select, concatenate


@properties
@given(tables(least=1), st.data())
def test_select_takes_episodes_in_the_given_order(made: Trajectories, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(made) - 1), max_size=5))
    chosen = made.select(index)
    assert len(chosen) == len(index)
    assert chosen.annotated == made.annotated
    names = [*TOKEN_COLUMNS, *(ANNOTATIONS if made.annotated else ())]
    for new, old in enumerate(index):
        assert {k: v[new] for k, v in chosen.episodes.items()} == {k: v[old] for k, v in made.episodes.items()}
        for name in names:
            np.testing.assert_array_equal(
                getattr(chosen, name)[chosen.offsets[new] : chosen.offsets[new + 1]],
                getattr(made, name)[made.offsets[old] : made.offsets[old + 1]],
            )
        for column, values in chosen.turns.items():
            ours = values[chosen.turn_offsets[new] : chosen.turn_offsets[new + 1]]
            assert ours == made.turns[column][made.turn_offsets[old] : made.turn_offsets[old + 1]]


@properties
@given(tables(least=1))
def test_concatenating_single_episodes_gives_the_whole(made: Trajectories) -> None:
    assert_equal(concatenate([made.select([i]) for i in range(len(made))]), made)


def test_concatenation_is_annotated_only_if_all_parts_are() -> None:
    plain = build([one_episode()])
    marked = replace(plain, **{name: np.ones(len(plain.input_ids), np.float32) for name in ANNOTATIONS})
    for parts in ([plain, marked], [marked, plain]):
        assert not concatenate(parts).annotated
        assert len(concatenate(parts)) == 2
    assert concatenate([marked, marked]).annotated


@properties
@given(tables(least=1))
def test_lengths_owners_and_groups_agree_with_the_offsets(made: Trajectories) -> None:
    for episode in range(len(made)):
        own = made.token_episode == episode
        assert own.sum() == made.lengths[episode]
        assert own[made.offsets[episode] : made.offsets[episode + 1]].all()
    names = made.episodes["group_id"]
    for i, one in enumerate(names):
        assert [made.groups[i] == made.groups[j] for j in range(len(names))] == [one == other for other in names]
    assert sorted(set(made.groups.tolist())) == list(range(len(set(names))))


# -------------------------------------------------------------------------------------------------------- branches


@st.composite
def forests(draw: st.DrawFn) -> list[EpisodeBuilder]:
    """Episodes of one group, some of them continued from others."""
    grown: list[EpisodeBuilder] = []
    for number in range(draw(st.integers(1, 6))):
        name = {
            "episode_id": str(number),
            "group_id": "g",
            "environment": "x",
            "state_key": "s",
            "seed": 0,
            "iteration": 0,
        }
        identity = name | {"policy_version": 0, "temperature": draw(st.sampled_from([0.5, 1.0]))}
        places = [(e, t) for e, b in enumerate(grown) for t in np.flatnonzero(b.tokens["sampled"]).tolist() if t]
        if places and draw(st.booleans()):
            parent, split = draw(st.sampled_from(places))
            builder = grown[parent].before(split, **identity)
            start = grown[parent].turns[len(builder.turns)]["start"]
        else:
            builder, start = EpisodeBuilder(**identity), 2
            builder.append_text([1, 2], Role.PROMPT)
        for turn in range(draw(st.integers(1, 3))):
            if turn:
                builder.append_text([3], Role.OBSERVATION)
                start = len(builder)
            size = draw(st.integers(1, 4))
            builder.append_sampled(range(size), [Role.ACTION] * size, [-1.0] * size, [0.5] * size)
            builder.close_turn(start, 1.0, "Up", True, f"s{turn}")
        builder.finish(True, "goal")
        grown.append(builder)
    return grown


@properties
@given(forests())
def test_a_token_is_trainable_once_where_it_was_sampled(grown: list[EpisodeBuilder]) -> None:
    """By loops: an episode trains what it sampled at its split or later, and of all sampled tokens there is one each."""
    made = build(grown)
    index = {name: number for number, name in enumerate(made.episodes["episode_id"])}
    parents = [-1 if name is None else index[name] for name in made.episodes["parent"]]
    assert made.parents.tolist() == parents
    assert made.splits.tolist() == [split or 0 for split in made.episodes["split"]]
    seen = set()
    for episode, builder in enumerate(grown):
        trainable = made.trainable[made.offsets[episode] : made.offsets[episode + 1]].tolist()
        for token, sampled in enumerate(builder.tokens["sampled"]):
            first = episode
            while parents[first] >= 0 and token < made.episodes["split"][first]:
                first = parents[first]
            assert trainable[token] == (sampled and first == episode)
            seen |= {(first, token)} if sampled else set()
    assert int(made.trainable.sum()) == len(seen)


@properties
@given(forests(), st.randoms())
def test_parents_are_found_in_any_order_and_missed_where_they_are_not(grown: list[EpisodeBuilder], draws: Any) -> None:
    made = build(grown)
    order = draws.sample(range(len(made)), len(made))
    mixed = made.select(order)
    assert [-1 if p < 0 else order[p] for p in mixed.parents] == made.parents[order].tolist()
    for episode in set(made.parents.tolist()) - {-1}:
        with pytest.raises(TrajectoryError, match=f"episode '{episode}', which others branch from, is missing"):
            made.select([e for e in range(len(made)) if e != episode]).parents  # noqa: B018


def test_a_branch_shares_the_beginning_and_the_turns_that_were_over() -> None:
    parent = one_episode(episode_id="p", temperature=0.5)
    branch = parent.before(7, episode_id="b")
    assert branch.identity == {"episode_id": "b", "parent": "p", "split": 7}
    assert branch.tokens == {name: values[:7] for name, values in parent.tokens.items()}
    assert branch.turns == parent.turns[:1]
    assert branch.outcome == {}
    whole = copy.deepcopy((parent.tokens, parent.turns))
    branch.append_sampled([9], [Role.OTHER], [-5.0], [2.0])
    branch.change_roles([Role.OTHER] * 5)
    branch.turns[0]["reward"] = 7.0
    assert (parent.tokens, parent.turns) == whole
    assert parent.before(4, episode_id="c").turns == []
    assert parent.before(4, episode_id="c").identity["parent"] == "p"


@pytest.mark.parametrize("split", [-1, 0, 1, 2, 5, 8, 99])
def test_a_branch_begins_at_a_token_that_the_policy_chose(split: int) -> None:
    with pytest.raises(ValueError, match=f"token {split} of p is not one that the policy chose"):
        one_episode(episode_id="p").before(split, episode_id="b")


def test_roles_of_the_last_tokens_change() -> None:
    builder = one_episode()
    before = list(builder.tokens["role"])
    builder.change_roles([])
    assert builder.tokens["role"] == before
    builder.change_roles([Role.OTHER, Role.OTHER, Role.REASONING])
    assert builder.tokens["role"] == [*before[:-3], Role.OTHER, Role.OTHER, Role.REASONING]


def test_temperature_and_places_of_branches_are_stored(tmp_path: Path) -> None:
    parent = one_episode(episode_id="p", temperature=0.75)
    branch = parent.before(6, episode_id="b", **{k: v for k, v in parent.identity.items() if k != "episode_id"})
    branch.append_sampled([9], [Role.OTHER], [-5.0], [2.0])
    branch.close_turn(6, 0.5, "", False, "s1")
    branch.finish(False, "turns")
    write(build([parent, branch, one_episode()]), tmp_path / "t")
    again = read(tmp_path / "t")
    assert again.episodes["temperature"] == [0.75, 0.75, None]
    assert again.episodes["parent"] == [None, "p", None]
    assert again.episodes["split"] == [None, 6, None]
    assert again.returns.tolist() == [0.9, 0.4, 0.9]
    own = [False, False, False, True, True, False, True, True]
    assert again.trainable.tolist() == [*own, *[False] * 6, True, *own]


# ------------------------------------------------------------------------------------------- rewards and roles


@properties
@given(tables(least=1))
def test_rewards_stand_on_the_last_sampled_token_of_their_turn(made: Trajectories) -> None:
    rewards, owner = made.token_rewards(), made.token_turn()
    assert not rewards[~made.sampled].any()
    for turn in range(len(made.turns["reward"])):
        tokens = np.flatnonzero(owner == turn)
        chosen = [t for t in tokens if made.sampled[t]]
        assert rewards[tokens].sum() == made.turns["reward"][turn]
        if chosen:
            assert rewards[chosen[-1]] == made.turns["reward"][turn]
    for episode in range(len(made)):
        own = rewards[made.offsets[episode] : made.offsets[episode + 1]]
        assert own.sum() == pytest.approx(made.returns[episode])


def test_golden_token_rewards_and_turns() -> None:
    made = build([one_episode(), one_episode()])
    assert made.token_rewards().tolist() == [0, 0, 0, 0, -0.1, 0, 0, 1.0] * 2
    assert made.token_turn().tolist() == [-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, 2, 2, 2, -1, 3, 3]
    assert made.returns.tolist() == [0.9, 0.9]


def test_reward_skips_tokens_forced_after_the_last_sampled_one() -> None:
    builder = EpisodeBuilder(episode_id="e", group_id="g", environment="x", state_key="s", seed=0, iteration=0)
    builder.identity["policy_version"] = 0
    builder.append_sampled([4, 5], [Role.ACTION] * 2, [-1.0, -2.0], [0.5, 0.25])
    builder.append_text([6], Role.ANSWER_TAG)
    builder.close_turn(0, 1.0, "Up", True, "s")
    builder.finish(True, "goal")
    assert build([builder]).token_rewards().tolist() == [0, 1, 0]


def test_reward_without_a_sampled_token_is_an_error() -> None:
    builder = one_episode()
    start = len(builder)
    builder.append_text([9], Role.THINK_TAG)
    builder.close_turn(start, 1.0, "Up", True, "s")
    builder.finish(True, "goal")
    with pytest.raises(TrajectoryError, match="no sampled token"):
        build([builder]).token_rewards()


@properties
@given(tables())
def test_sampled_tokens_have_response_roles_and_the_rest_no_statistics(made: Trajectories) -> None:
    assert set(made.role[made.sampled].tolist()) <= {int(role) for role in RESPONSE_ROLES}
    assert set(made.role.tolist()) <= {int(role) for role in Role}
    assert not made.logprob[~made.sampled].any()
    assert not made.entropy[~made.sampled].any()
    inside = made.token_turn() >= 0
    assert not (made.sampled & ~inside).any()
    outside = made.role[~inside].tolist()
    assert set(outside) <= {int(Role.PROMPT), int(Role.OBSERVATION)}
