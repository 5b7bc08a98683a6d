"""Whole forests without a model: budgets, parents, replayed prefixes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rollout.engine import Continuation, Sampling
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.forest import Forest
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.settings.branching import Independent, Positions
from pipeline.settings.section import Section
from pipeline.trajectories.parsing import decode, token_roles
from pipeline.trajectories.table import to_table
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.randomness import generator
from tests.batches import properties
from tests.branching_cases import assert_forest, branch_of
from tests.forests import (
    Chatter,
    grow,
    lake,
    phrases,
    planted,
    positions_section,
    rise_section,
    rows,
    search_section,
    shift_section,
)
from tests.test_collector import NAME, TOKENIZER, says


def sections(size: int) -> st.SearchStrategy[Section]:
    """Any settings, and more episodes than there are where a section does not know how many that is."""
    few, any_width = st.integers(1, size - 1), st.integers(2, size + 2)
    rise = {
        "initial": st.one_of(st.integers(1, size), st.just("monitored")),
        "base": st.one_of(st.none(), st.floats(0, 1)),
        "slope": st.floats(0, 3),
        "threshold": st.floats(0, 1),
        "penalty": st.floats(0.01, 1),
        "penalty_per": st.sampled_from(["path", "prompt"]),
        "tokens": st.integers(1, 12),
        "width": st.integers(1, size),
    }
    place = {
        "initial": few,
        "side": st.sampled_from(["before", "after"]),
        "width": st.integers(1, size),
        "candidates": st.sampled_from(["sampled", "likeliest"]),
    }
    erroneous = {**place, "side": st.just("before"), "among": st.just("erroneous")}
    return st.one_of(
        st.builds(rise_section, **rise),
        st.builds(positions_section, **place),
        st.builds(search_section, any_width, exploration=st.floats(0, 3)),
        st.builds(positions_section, **erroneous),
        st.builds(shift_section, st.floats(0.01, 0.99), target=st.floats(0, 1)),
    )


@properties
@given(st.integers(2, 9).flatmap(lambda size: st.tuples(st.just(size), sections(size))), st.integers(0, 99), st.data())
def test_any_forest_meets_its_budget_with_branches_of_its_own_episodes(
    chosen: tuple[int, Section], seed: int, data: st.DataObject
) -> None:
    size, section = chosen
    changed = lake(group_size=size, context_tokens=data.draw(st.sampled_from([120, 300]), "context"))
    share = data.draw(st.sampled_from([0.0, 0.9, 1.0]), "tokens where none may branch")
    specs = iteration_specs(changed, NAME, seed, 0)

    def score(wave: Trajectories) -> np.ndarray:
        draws = np.random.default_rng(seed).random((2, len(wave.input_ids)))
        return np.where(wave.sampled & (draws[0] >= share), draws[1].round(1), -np.inf)

    made = planted(changed, section, specs=specs, score=score)
    assert_forest(made, changed, specs)
    if share == 1 and isinstance(section, Positions):
        assert (made.parents == -1).all()
    again = planted(changed, section, specs=specs, score=score)
    assert to_table(again).equals(to_table(made))


def test_branches_grow_from_branches_and_siblings_at_one_place_go_their_own_ways() -> None:
    changed = lake(group_size=9)
    made = planted(changed, rise_section(initial=1, base=1.0, slope=0.0, threshold=0.1, penalty=0.0, width=2))
    table, parents = rows(made), made.parents
    assert any(parents[parents[e]] >= 0 for e in range(len(made)) if parents[e] >= 0)
    siblings = [
        (one, other)
        for one, other in itertools.combinations([row for row in table if row["parent"]], 2)
        if (one["parent"], one["split"]) == (other["parent"], other["split"])
    ]
    assert len(siblings) >= 4
    assert any(one["input_ids"].tolist() != other["input_ids"].tolist() for one, other in siblings)


def test_a_group_grows_as_it_does_alone() -> None:
    """What other groups do decides nothing."""
    changed = lake(groups=4)
    specs = iteration_specs(changed, NAME, 0, 0)
    for section in (rise_section(initial=2), search_section(2), positions_section(initial=2), shift_section(0.5)):
        together = rows(planted(changed, section))
        for start in range(0, len(specs), 6):
            alone = rows(planted(changed, section, specs=specs[start : start + 6]))
            for one, other in zip(alone, together[start : start + 6], strict=True):
                assert one.keys() == other.keys()
                for name in one:
                    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_episodes_at_another_temperature_are_sampled_and_recorded_at_it() -> None:
    changed, asked_for = lake(), list[float]()

    class Noting(Chatter):
        def generate(self, requests: Any, sampling: Sampling, follow: Any = None) -> list[Continuation]:
            asked_for.append(sampling.temperature)
            return super().generate(requests, sampling, follow)

    made = planted(changed, shift_section(1 / 3, target=5.0, high=1.75), Noting())
    assert made.episodes["temperature"] == [1.0, 1.0, 1.0, 1.0, 1.75, 1.75] * 2
    assert asked_for == [1.0, 1.75]
    assert (made.parents == -1).all()


@pytest.mark.parametrize("number", range(6))
def test_a_branch_may_say_as_much_as_was_left_and_draws_as_its_name_says(number: int) -> None:
    """Its first draw is that of its own generator at the place where it takes up the response."""
    changed = lake()
    section = changed.environments[NAME]
    setup = Setup(TOKENIZER, changed, NAME)
    forest = Forest(Chatter(), setup, iteration_specs(changed, NAME, number, 0)[:1], Independent(), 1.0)
    list(grow(forest))
    (parent,) = forest.trees[0].episodes
    for split in forest.trees[0].sampled(0).tolist():
        turn = next(turn for turn in parent.builder.turns if turn["end"] > split)
        branch = branch_of(parent, split)
        assert branch.turn == parent.builder.turns.index(turn) + 1
        request = branch.request()
        assert list(request.ids) == parent.builder.ids[:split]
        assert request.forced == split - turn["start"]
        room = min(section.response_tokens - request.forced, max(1, section.context_tokens - split))
        draws = generator(0, "tokens", f"branch at {split}").random(section.response_tokens)
        np.testing.assert_array_equal(request.uniforms, draws[request.forced :][:room])
    for split in set(range(len(parent.builder) + 1)) - set(forest.trees[0].sampled(0).tolist()):
        with pytest.raises(ValueError, match=f"token {split} of .* is not one that the policy chose"):
            branch_of(parent, split)


@pytest.mark.parametrize("seed", range(3))
def test_candidates_begin_with_other_tokens_than_the_one_that_stands_there(seed: int) -> None:
    """Each with another one, recorded with the log-probability and the entropy of its place, and none that ends a response."""
    changed = lake(group_size=8)
    specs = iteration_specs(changed, NAME, seed, 0)
    section = positions_section(initial=2, side="before", width=3, candidates="likeliest")

    def choices(wave: Trajectories) -> np.ndarray:
        return np.where(wave.sampled, [len(set(own)) for own in phrases(wave).tokens.tolist()], -np.inf)

    made = planted(changed, section, specs=specs, score=choices)
    table, found = rows(made), 0
    for e, row in enumerate(table):
        if row["split"] is None:
            continue
        parent, split = table[int(made.parents[e])], row["split"]
        assert row["input_ids"][split] != parent["input_ids"][split]
        assert row["logprob"][split] == -1.5
        assert row["entropy"][split] == parent["entropy"][split]
        (turn,) = (turn for turn in row["turns"] if turn["start"] <= split < turn["end"])
        assert split < turn["end"] - 1
        found += 1
    assert found >= 4
    places = [(row["parent"], row["split"], int(row["input_ids"][row["split"]])) for row in table if row["parent"]]
    assert len(places) == len(set(places))


def test_a_response_goes_on_behind_a_token_that_neither_ends_it_nor_takes_the_last_room() -> None:
    parent = Episode(Setup(TOKENIZER, lake(response_tokens=18), NAME), EpisodeSpec("p", "g", 1, 0, 0, 0, (0, "t")))
    said, start = TOKENIZER(says("Up"), add_special_tokens=False)["input_ids"], len(parent.builder)
    parent.take(Continuation(said, [0.0] * len(said), [0.0] * len(said), "stop", 0))
    last = start + len(said) - 1
    assert not parent.goes_on_with(last, said[-1])
    assert parent.goes_on_with(last, said[0])
    assert parent.goes_on_with(start, said[1])
    full = Episode(Setup(TOKENIZER, lake(response_tokens=len(said)), NAME), parent.spec)
    full.take(Continuation(said, [0.0] * len(said), [0.0] * len(said), "stop", 0))
    assert full.goes_on_with(last - 1, said[0])
    assert not full.goes_on_with(last, said[0])


def test_what_a_response_turns_out_to_be_decides_on_the_beginning_that_it_shares() -> None:
    """An action is one only if its tag is closed; the parent's stays what it was."""
    parent = Episode(Setup(TOKENIZER, lake(), NAME), EpisodeSpec("p", "g", 1, 0, 0, 0, (0, "t")))
    said, start = TOKENIZER(says("Up"), add_special_tokens=False)["input_ids"], len(parent.builder)
    parent.take(Continuation(said, [0.0] * len(said), [0.0] * len(said), "stop", 0))
    closed = list(parent.builder.tokens["role"])
    branch = branch_of(parent, start + len(said) - 1)
    branch.take(Continuation([TOKENIZER.eos_token_id], [0.0], [0.0], "eos", 0))
    whole = token_roles(decode(TOKENIZER, [*said[:-1], TOKENIZER.eos_token_id]))
    assert branch.builder.tokens["role"][start : start + len(said)] == whole
    assert Role.ACTION not in whole
    assert Role.ACTION in closed
    assert parent.builder.tokens["role"] == closed
