"""Branching rollouts: what grows, whether branches are what they claim to be, what they cost, and trainings on them."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import slots
from pipeline.config import Config, ConfigError, Environment
from pipeline.contracts import BOUNDS, _Suite
from pipeline.energy.annotate import score_trajectories
from pipeline.environments import make
from pipeline.environments.registry import EXTRAS, parse_action, reset, step
from pipeline.files import read_json
from pipeline.policy.model import Policy, load_policy
from pipeline.prompting import Dialogue, decode, token_roles
from pipeline.randomness import generator
from pipeline.rollout.branching import (
    ROOT,
    Forest,
    Origin,
    Tree,
    branches_by_role,
    entropy_rise,
    expandable,
    monitored_budget,
    positions,
    ranked_positions,
    rises,
    temperature_switch,
    turn_path,
)
from pipeline.rollout.collector import Episode, EpisodeSpec, Setup, collect, iteration_specs
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.scores import action_starts, branch_scores, omega
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.section import Section
from pipeline.timing import Phases
from pipeline.training.collection import Collection
from pipeline.training.module import PolicyGradient
from pipeline.training.result import TrainingTask, training_task
from pipeline.training.run import TrainingJob, train_one
from pipeline.trajectory import EpisodeBuilder, Role, Trajectories, build, concatenate, read
from tests.test_collector import EOS, NAME, TOKENIZER, config, says
from tests.test_contracts import EXAMPLES, SOUND, Walk
from tests.test_engine import random_policy
from tests.test_training import LAKE, configured, fit, supervised

properties = settings(deadline=None, max_examples=60, derandomize=True)


def positions_section(**changes: Any) -> slots.Positions:
    return slots.Positions(kind="positions", **{"signal": "entropy", **changes})


def rise_section(**changes: Any) -> slots.EntropyRise:
    return slots.EntropyRise(kind="entropy_rise", **changes)


def search_section(width: int, **changes: Any) -> slots.TreeSearch:
    return slots.TreeSearch(kind="tree_search", width=width, **changes)


def switch_section(initial: int, **changes: Any) -> slots.TemperatureSwitch:
    return slots.TemperatureSwitch(kind="temperature_switch", initial=initial, **changes)


# ------------------------------------------------------------------------------------- whole forests, without a model

PHRASES = [
    TOKENIZER(text, add_special_tokens=False)["input_ids"]
    for text in (
        *(says(move) for move in ("Up", "Left", "Down", "Right", "Fly")),
        "<think>so let me think</think><answer>Down</answer>",
        f"so{EOS}",
        f"<think>so</think><answer>Up{EOS}",
        "so let me think and think and think",
    )
]


class Chatter:
    """A ``RolloutEngine`` that says phrases, token by token: a draw chooses among the tokens that go on with one of them.

    Entropies are draws too, so that any order of them comes up.
    """

    policy_version = 3

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        last = []
        for number, first in enumerate(requests):
            request: Request | None = first
            while request is not None:
                last[number:] = [self._say(request)]
                request = follow(number, last[number]) if follow else None
        return last

    def forget(self) -> None: ...

    def _say(self, request: Request) -> Continuation:
        answer, ids = Continuation([], [], [], "length", self.policy_version), list(request.ids)
        begun = ids[len(ids) - request.forced :]
        for draw in request.uniforms:
            said = [*begun, *answer.ids]
            following = sorted({own[len(said)] for own in PHRASES if own[: len(said)] == said})
            answer.ids.append(following[int(draw * len(following))])
            answer.logprob.append(-math.log(len(following)))
            answer.entropy.append(float(draw * 7919 % 1))
            if [*begun, *answer.ids] in PHRASES:
                finish = "eos" if answer.ids[-1] == TOKENIZER.eos_token_id else "stop"
                return Continuation(answer.ids, answer.logprob, answer.entropy, finish, self.policy_version)
        return answer


def lake(groups: int = 2, group_size: int = 6, **environment: Any) -> Config:
    """A slippery lake, with room for some responses and not for others."""
    changes = {"response_tokens": 18, "context_tokens": 300, "format_penalty": -0.1, **environment}
    slippery = {"success_rate": 0.6, "frozen": 0.9, "size": 4, "least_distance": 3}
    return config({"groups": groups, "group_size": group_size}, slippery, **changes)


def grow(
    forest: Forest, score: Callable[[Trajectories], np.ndarray] = lambda wave: wave.entropy.astype(np.float64)
) -> Iterator[Trajectories]:
    """All waves; ``score`` is what ``positions`` gets."""
    for number in itertools.count():
        if (wave := forest.wave()) is None:
            return
        yield wave
        if number == 0:
            forest.score(wave, score(wave))


def in_order(forest: Forest, waves: Iterable[Trajectories]) -> Trajectories:
    table = concatenate(list(waves))
    place = {name: index for index, name in enumerate(table.episodes["episode_id"])}
    return table.select([place[name] for name in forest.order()])


def planted(
    changed: Config,
    section: Section,
    engine: Any = None,
    tokenizer: Any = TOKENIZER,
    specs: Sequence[EpisodeSpec] | None = None,
    **score: Any,
) -> Trajectories:
    """The forest of an iteration, grown."""
    chosen = iteration_specs(changed, NAME, 0, 0) if specs is None else specs
    setup = Setup(tokenizer, changed, NAME)
    forest = Forest(engine or Chatter(), setup, chosen, section, changed.rollout.temperature)
    return in_order(forest, grow(forest, **score))


def rows(table: Trajectories) -> list[dict[str, Any]]:
    """Each episode's columns, turns and tokens apart from the others'."""
    made = []
    for e in range(len(table)):
        tokens = slice(table.offsets[e], table.offsets[e + 1])
        turns = range(table.turn_offsets[e], table.turn_offsets[e + 1])
        made.append(
            {name: column[e] for name, column in table.episodes.items()}
            | {name: getattr(table, name)[tokens] for name in ("input_ids", "role", "sampled", "logprob", "entropy")}
            | {"turns": [{name: column[turn] for name, column in table.turns.items()} for turn in turns]}
            | {"trainable": table.trainable[tokens]}
        )
    return made


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
            whole = token_roles(decode(tokenizer, row["input_ids"][own].tolist()))
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
        "among": st.sampled_from(["all", "failed"]),
        "width": st.integers(1, size),
    }
    return st.one_of(
        st.builds(rise_section, **rise),
        st.builds(positions_section, **place),
        st.builds(search_section, any_width, exploration=st.floats(0, 3)),
        st.builds(switch_section, few, target=st.floats(0.01, 1)),
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
    if share == 1 and isinstance(section, slots.Positions):
        assert (made.parents == -1).all()
    again = planted(changed, section, specs=specs, score=score)
    assert again.to_table().equals(made.to_table())


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
    for section in (rise_section(initial=2), search_section(2), positions_section(initial=2), switch_section(3)):
        together = rows(planted(changed, section))
        for start in range(0, len(specs), 6):
            alone = rows(planted(changed, section, specs=specs[start : start + 6]))
            for one, other in zip(alone, together[start : start + 6], strict=True):
                assert one.keys() == other.keys()
                for name in one:
                    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def branch_of(parent: Episode, split: int) -> Episode:
    name = f"branch at {split}"
    spec = EpisodeSpec(name, parent.spec.group_id, 0, 0, 0, 0, (0, "tokens", name))
    return Episode.branch(parent, spec, split)


@pytest.mark.parametrize("number", range(6))
def test_a_branch_may_say_as_much_as_was_left_and_draws_as_its_name_says(number: int) -> None:
    """Its first draw is that of its own generator at the place where it takes up the response."""
    changed = lake()
    section = changed.environments[NAME]
    setup = Setup(TOKENIZER, changed, NAME)
    forest = Forest(Chatter(), setup, iteration_specs(changed, NAME, number, 0)[:1], slots.Independent(), 1.0)
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


def test_what_a_response_turns_out_to_be_decides_on_the_beginning_that_it_shares() -> None:
    """An action is one only if its tag is closed; the parent's stays what it was."""
    section = lake().environments[NAME]
    dialogue = Dialogue(TOKENIZER, "compact", "", section.response_tokens)
    parent = Episode(section, dialogue, EpisodeSpec("p", "g", 1, 0, 0, 0, (0, "t")), Phases())
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


# ---------------------------------------------------------------------------- environments: copied, or led there again


def chosen_action(suite: _Suite, environment: Any, observation: str) -> str:
    return str(suite.action(environment, observation))


@pytest.mark.parametrize("name", [*SOUND, *EXTRAS])
def test_a_replayed_environment_is_the_one_that_was_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every turn and token: what a deep copy made then answers to the same actions, a branch's environment answers."""
    if name in EXTRAS and importlib.util.find_spec(EXTRAS[name][1].replace("-", "_")) is None:
        pytest.skip(f"{EXTRAS[name][1]} is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    limits = {"max_turns": 9, "response_tokens": 400, "context_tokens": 100_000, "actions_per_turn": 2}
    section = SOUND.get(name, Environment(id=name)).model_copy(update=limits)
    dialogue = Dialogue(TOKENIZER, "compact", "", section.response_tokens)
    compared = 0
    for state in range(3):
        suite = _Suite(section, None, BOUNDS)
        spec = EpisodeSpec(str(state), str(state), state, 0, 0, 70 + state, (0, "tokens", state))
        episode, copies = Episode(section, dialogue, spec, Phases()), list[Any]()
        while not episode.done:
            copies.append((copy.deepcopy(episode.environment), episode.observation))
            actions = [chosen_action(suite, episode.environment, episode.observation) for _ in range(2)]
            text = "what" if len(copies) == 2 else says("||".join(actions))
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            episode.take(Continuation(ids, [-1.0] * len(ids), [1.0] * len(ids), "stop", 0))
        for turn, (twin, observation) in zip(episode.builder.turns, copies, strict=True):
            for split in {turn["start"], (turn["start"] + turn["end"]) // 2, turn["end"] - 1}:
                branch = branch_of(episode, split)
                assert branch.observation == observation
                later = [following for following in episode.builder.turns if following["end"] >= turn["end"]]
                assert answers(branch.environment, later) == answers(copy.deepcopy(twin), later)
                compared += len(later)
    assert compared >= 9


def answers(environment: Any, turns: Sequence[dict[str, Any]]) -> list[Any]:
    """All that an environment shows while it is led through turns."""
    seen: list[Any] = [(environment.instructions, environment.state_key, environment.success)]
    for turn in turns:
        for action in turn["action"].split("||") if turn["valid"] else ():
            assert parse_action(environment, action) == action or action in turn["action"]
            shown = step(environment, action)
            seen.append((shown, environment.state_key, environment.success, getattr(environment, "actions_left", None)))
            if shown[2]:
                return seen
    return seen


class Forgetful(Walk):
    """Its noise is drawn from a generator that no seed resets."""

    noise = np.random.default_rng(0)

    def slips(self) -> bool:
        return bool(self.noise.random() < 0.5)


gymnasium.register(id="Forgetful-v0", entry_point=Forgetful, disable_env_checker=True)


def test_an_environment_that_cannot_be_led_there_again_is_named_in_one_line() -> None:
    changed = config({"group_size": 6}, max_turns=12, context_tokens=900)
    walk = changed.environments[NAME].model_copy(update={"id": "Forgetful-v0", "settings": {}})
    changed = changed.model_copy(update={"environments": {NAME: walk}})
    dialogue = Dialogue(TOKENIZER, "compact", "", walk.response_tokens)
    said = TOKENIZER(says("left"), add_special_tokens=False)["input_ids"]
    refusals = []
    for state in range(20):
        episode = Episode(walk, dialogue, EpisodeSpec("e", "g", state, 0, 0, state, (0, "t")), Phases())
        while not episode.done:
            episode.take(Continuation(said, [0.0] * len(said), [0.0] * len(said), "stop", 0))
        try:
            branch_of(episode, episode.builder.turns[-1]["start"])
        except ConfigError as error:
            refusals.append(str(error))
    assert len(refusals) >= 5
    assert set(refusals) == {
        "environments: 'Forgetful-v0' does not come to the same state by the same actions and seeds, so that no episode of "
        "it can be continued; its noise must come from the seed of reset alone"
    }


# -------------------------------------------------------------------------------------------------- made-up episodes

fresh = itertools.count(100)


def plant(budget: int, seed: int = 0) -> Tree:
    return Tree(specs=[None] * budget, draws=np.random.default_rng(seed))  # type: ignore[list-item]


def say(builder: EpisodeBuilder, turns: Sequence[Sequence[float]], start: int | None = None) -> None:
    """Turns with tokens of these entropies, two tokens of observation between them; the first may have begun."""
    for number, entropies in enumerate(turns):
        if number:
            builder.append_text([next(fresh), next(fresh)], Role.OBSERVATION)
        begun = len(builder) if start is None or number else start
        ids, size = [next(fresh) for _ in entropies], len(entropies)
        builder.append_sampled(ids, [Role.REASONING] * size, [-1.0] * size, list(entropies))
        builder.close_turn(begun, 0.0, "", False, "s")


def add(
    tree: Tree, origin: Origin, turns: Sequence[Sequence[float]], value: float = 0.0, success: bool = False
) -> None:
    """An episode that was played from there."""
    origin, name = tree.owner(origin), str(len(tree.episodes))
    if origin.parent is None:
        builder, start = EpisodeBuilder(episode_id=name), None
        builder.append_text([1, 2, 3], Role.PROMPT)
    else:
        parent = tree.episodes[origin.parent].builder
        builder = parent.before(origin.split, episode_id=name)
        start = parent.turns[len(builder.turns)]["start"]
    say(builder, turns, start)
    builder.finish(success, "turns")
    builder.outcome["return"] = value
    tree.episodes.append(SimpleNamespace(builder=builder))  # type: ignore[arg-type]
    tree.origins.append(origin)


def asked(tree: Tree, growth: Iterator[list[Origin]], turns: Callable[[Origin], Any]) -> list[list[Origin]]:
    """What a growth asks for, answered with episodes of these turns until there is no room."""
    places = []
    while tree.room and (origins := next(growth, None)) is not None:
        places.append(origins)
        for origin in origins[: tree.room]:
            add(tree, origin, turns(origin))
    return places


def at(*places: tuple[int, int]) -> list[Origin]:
    return [Origin(parent, split) for parent, split in places]


def turns_left(openings: Sequence[float]) -> Callable[[Origin], list[list[float]]]:
    """Turns of three tokens that all begin at 3, 8, 13, ...; the entropy of the last is far off."""
    return lambda origin: [[h, h, 99.0] for h in openings[max(0, origin.split - 3) // 5 :]]


FLAT = turns_left([1.0] * 4)
PLAIN = {"monitor_slope": 0.5, "slope": 0.0, "tokens": 2, "width": 1, "threshold": 0.5, "base": 0.55, "penalty": 0.1}


def test_a_penalty_counts_the_branchings_in_a_row_of_a_path() -> None:
    """At 0.55 against 0.5 a penalty of 0.1 forbids two in a row: 0.55 * 0.9 < 0.5."""
    tree = plant(20)
    places = asked(tree, entropy_rise(tree, initial=2, penalty_per="path", **PLAIN), FLAT)
    assert places == [[ROOT, ROOT], at((0, 8), (1, 8)), [], at((0, 18), (1, 18), (2, 18), (3, 18))]


def test_a_penalty_counts_the_branchings_in_a_row_of_a_prompt() -> None:
    """In the order of turns and episodes every other decision is a branching."""
    tree = plant(20)
    places = asked(tree, entropy_rise(tree, initial=2, penalty_per="prompt", **PLAIN), FLAT)
    assert places == [[ROOT, ROOT], at((0, 8)), at((0, 13), (2, 13)), at((1, 18), (3, 18))]


def test_a_branch_takes_its_paths_branchings_along() -> None:
    """At 0.6 two in a row are allowed and a third is not: 0.6 * 0.8 < 0.5, for the branches of both too."""
    tree = plant(20)
    growth = entropy_rise(tree, initial=1, penalty_per="path", **{**PLAIN, "base": 0.6})
    assert asked(tree, growth, FLAT) == [[ROOT], at((0, 8)), at((0, 13), (1, 13)), []]


def test_episodes_branch_where_the_first_tokens_are_more_uncertain_than_the_first_responses() -> None:
    """At slope 1 from 0 the threshold of 0.5 asks for half a nat; the third token of a response does not count."""
    tree = plant(9)
    rising = {**PLAIN, "base": 0.0, "slope": 1.0, "penalty": 0.0, "width": 2}
    growth = entropy_rise(tree, initial=1, penalty_per="path", **rising)
    places = asked(tree, growth, turns_left([1.0, 1.5, 1.25, 2.0]))
    assert places == [[ROOT], at((0, 8), (0, 8)), [], at((0, 18), (0, 18), (1, 18), (1, 18), (2, 18), (2, 18))]


@pytest.mark.parametrize("seed", range(5))
def test_without_a_base_every_decision_has_a_draw_of_its_own(seed: int) -> None:
    tree, draws = plant(40, seed), np.random.default_rng(seed)
    growth = entropy_rise(tree, initial=3, penalty_per="path", **{**PLAIN, "base": None, "penalty": 0.0})
    places = asked(tree, growth, FLAT)
    paths = 3
    for turn, origins in enumerate(places[1:], start=1):
        decided = [path for path in range(paths) if draws.random() >= 0.5]
        assert origins == at(*((path, 3 + 5 * turn) for path in decided))
        paths += len(origins)
    assert len(places) == 4


CHANCES = [(0, 0.5), (5, 0.33), (9, 0.09)]


@pytest.mark.parametrize(("streak", "published"), [*CHANCES, (10, 0.0), (30, 0.0)])
def test_aepos_chance_falls_with_the_branchings_in_a_row(streak: int, published: float) -> None:
    """At dH = 0: 1 - 0.5 / (1 - 0.05 l), counted over an even grid of draws."""
    grid = 20_000
    draws = (np.arange(grid) + 0.5) / grid
    share = sum(rises(0.0, streak, draw, 0.2, 0.5, 0.05) for draw in draws) / grid
    exact = max(0.0, 1 - 0.5 / max(1 - 0.05 * streak, 1e-9))
    assert abs(share - exact) <= 1 / grid
    assert round(share, 2) == published


@given(st.floats(-20, 20), st.integers(0, 50))
def test_arpo_is_aepo_with_a_constant_draw_and_no_penalty(rise: float, streak: int) -> None:
    assert rises(rise, streak, 0.5, 0.2, 0.5, 0.0) == (0.5 + 0.2 * rise >= 0.5)


@pytest.mark.parametrize(
    ("root", "tools", "expected"),
    [
        (1.0, [1.0], 9),  # 16 * 0.5 + 1
        (3.0, [1.0], 12),  # 16 * 0.7311 = 11.7
        (1.0, [2.0, 4.0], 5),  # 16 * 0.2689 = 4.3
        (1.0, [], 9),
        (500.0, [0.0], 16),  # 17 of 16
        (0.0, [500.0], 1),
        (0.0, [5000.0], 1),
    ],
)
def test_aepos_budget_of_known_entropies(root: float, tools: list[float], expected: int) -> None:
    assert monitored_budget(root, tools, 16, 0.5) == expected


@given(st.floats(0, 20), st.lists(st.floats(0, 20), max_size=4), st.integers(2, 64), st.floats(0, 100))
def test_aepos_budget_is_between_one_and_all(root: float, tools: list[float], budget: int, slope: float) -> None:
    assert 1 <= monitored_budget(root, tools, budget, slope) <= budget


def test_a_monitored_tree_begins_with_as_many_episodes_as_its_first_ones_entropies_say() -> None:
    """Of 16: the root's 1 nat against 3 over the later turns."""
    tree = plant(16)
    monitored = {**PLAIN, "base": 0.0, "slope": 0.0}
    growth = entropy_rise(tree, initial="monitored", penalty_per="path", **monitored)
    places = asked(tree, growth, turns_left([1.0, 2.0, 4.0]))
    assert places == [[ROOT], [ROOT] * 4, [], []]


def random_tree(draws: np.random.Generator, at_turns: bool) -> Tree:
    """Roots, and branches at places of any of them."""
    tree = plant(int(draws.integers(2, 14)))
    while tree.room:
        origin = ROOT
        if tree.episodes and draws.random() < 0.7:
            parent = int(draws.integers(len(tree.episodes)))
            turns = range(len(tree.turns(parent)))
            starts = (
                [int(tree.sampled(parent, turn)[0]) for turn in turns][1:] if at_turns else tree.sampled(parent)[1:]
            )
            if len(starts):
                origin = Origin(parent, int(draws.choice(starts)))
        turns = [[1.0] * int(draws.integers(1, 4)) for _ in range(draws.integers(1, 5))]
        add(tree, origin, turns, float(draws.integers(-1, 3)), bool(draws.integers(2)))
    return tree


class Node:
    """A state of the search: the episodes through it, and the states that they went on to."""

    def __init__(self) -> None:
        self.values, self.children, self.first = list[float](), dict[int, Node](), -1


def searched(tree: Tree, width: int, exploration: float) -> list[Origin] | None:
    """``expandable`` with nodes that are grown episode by episode, and a list of those to try."""
    returns = [episode.builder.outcome["return"] for episode in tree.episodes]
    low, high = min(returns), max(returns)
    root, trails = Node(), list[list[int]]()
    for episode, value in enumerate(returns):
        parent, split, _ = tree.origins[episode]
        turns = tree.turns(episode)
        shared = 0 if parent is None else [turn["start"] for turn in turns].index(split)
        trail = [*([] if parent is None else trails[parent][:shared]), *[episode] * (len(turns) - shared)]
        trails.append(trail)
        node = root
        for depth, name in enumerate([*trail, None]):
            node.values.append((value - low) / (high - low) if high > low else 0.0)
            if name is not None:
                if not node.children:
                    node.first = episode
                node.children.setdefault(name, Node())
                node = node.children[name]
                node.depth = depth + 1  # type: ignore[attr-defined]
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        if not node.children:
            continue
        if len(node.children) < width:
            wanted = width - len(node.children)
            if not depth:
                return [ROOT] * wanted
            return [Origin(node.first, tree.turns(node.first)[depth]["start"])] * wanted
        bounds = []
        for child in node.children.values():
            mean = sum(child.values) / len(child.values)
            bounds.append(mean + exploration * math.sqrt(math.log(len(node.values)) / len(child.values)))
        order = sorted(range(len(bounds)), key=lambda i: (-round(bounds[i], 12), i))
        stack += [(list(node.children.values())[i], depth + 1) for i in reversed(order)]
    return None


@properties
@given(st.integers(0, 10_000), st.integers(2, 3), st.floats(0, 2))
def test_tree_search_goes_where_a_slow_search_goes(seed: int, width: int, exploration: float) -> None:
    tree = random_tree(np.random.default_rng(seed), at_turns=True)
    assert expandable(tree, width, exploration) == searched(tree, width, exploration)


def test_tree_search_by_hand() -> None:
    """Two roots of returns 0 and 1: with little exploration the better one is gone into, with much the less known one."""
    tree = plant(9)
    add(tree, ROOT, [[1.0]] * 3, value=0.0)
    add(tree, ROOT, [[1.0]] * 3, value=1.0)
    assert expandable(tree, 2, 0.1) == [Origin(1, 6)]
    add(tree, Origin(1, 6), [[1.0]] * 2, value=1.0)
    assert expandable(tree, 2, 0.1) == [Origin(1, 9)]
    assert expandable(tree, 2, 9.0) == [Origin(0, 6)]  # one episode beneath it, against two


@properties
@given(st.integers(0, 10_000))
def test_equal_beginnings_of_turn_paths_are_shared_turns(seed: int) -> None:
    """A turn is whose last token it is: a branch within a response makes that turn its own."""
    tree = random_tree(np.random.default_rng(seed), at_turns=False)

    def sampler(episode: int, token: int) -> int:
        parent, split, _ = tree.origins[episode]
        return episode if parent is None or token >= split else sampler(parent, token)

    for episode in range(len(tree.episodes)):
        ends = [turn["end"] - 1 for turn in tree.turns(episode)]
        assert turn_path(tree, episode) == tuple(sampler(episode, end) for end in ends)


@properties
@given(st.integers(0, 10_000))
def test_a_place_belongs_to_the_oldest_episode_that_has_sampled_the_token_before_it(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), at_turns=False)
    for episode in range(len(tree.episodes)):
        for split in tree.sampled(episode).tolist()[1:]:
            owned = tree.owner(Origin(episode, split))
            assert owned.split == split
            beginnings = [other.builder.ids[:split] for other in tree.episodes]
            assert owned.parent is not None
            assert beginnings[owned.parent] == beginnings[episode]
            assert tree.origins[owned.parent].split < split
            holders = [e for e, ids in enumerate(beginnings) if ids == beginnings[episode]]
            assert owned.parent == min(holders)


@pytest.mark.parametrize(("target", "chosen"), [(0.51, 1.5), (0.5, 0.7), (0.49, 0.7)])
def test_temperature_rises_where_the_initial_episodes_are_below_the_target(target: float, chosen: float) -> None:
    """Their sampled tokens' mean entropy is 0.5 (of each episode: 0.2 over 3 tokens, 0.8 over 3)."""
    tree = plant(5)
    growth = temperature_switch(tree, initial=2, target=target, high=1.5, low=0.7)
    entropies = itertools.count()
    places = asked(tree, growth, lambda origin: [[(0.25, 0.75)[next(entropies) % 2]] * 4])
    assert places == [[ROOT, ROOT], [Origin(temperature=chosen)] * 3]


def test_episodes_at_another_temperature_are_sampled_and_recorded_at_it() -> None:
    changed, asked_for = lake(), list[float]()

    class Noting(Chatter):
        def generate(self, requests: Any, sampling: Sampling, follow: Any = None) -> list[Continuation]:
            asked_for.append(sampling.temperature)
            return super().generate(requests, sampling, follow)

    made = planted(changed, switch_section(4, target=5.0, high=1.75), Noting())
    assert made.episodes["temperature"] == [1.0, 1.0, 1.0, 1.0, 1.75, 1.75] * 2
    assert asked_for == [1.0, 1.75]
    assert (made.parents == -1).all()


def scored_tree(values: Sequence[Sequence[float]], successes: Sequence[bool], budget: int) -> Tree:
    """Initial episodes of two turns of two tokens (at 3, 4 and 7, 8), with scores of these."""
    tree = plant(budget)
    for success, own in zip(successes, values, strict=True):
        add(tree, ROOT, [[1.0, 1.0]] * 2, success=success)
        scores = np.full(9, -np.inf)
        scores[[3, 4, 7, 8]] = own
        tree.scores.append(scores)
    return tree


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(1, 4), (0, 7), (0, 4)]),
        ({"side": "before"}, [(1, 8), (1, 3), (0, 4)]),
        ({"among": "failed"}, [(0, 7), (0, 4), (0, 8)]),
        ({"width": 2}, [(1, 4), (1, 4), (0, 7), (0, 7)]),
        ({"width": 3}, [(1, 4), (1, 4), (1, 4)]),
    ],
)
def test_branches_begin_at_the_best_positions(changes: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    """A score is its token's; ``after`` samples the next one, over an observation too, and has none after the last."""
    inf = math.inf
    tree = scored_tree([[2.0, 3.0, 1.0, -inf], [5.0, -inf, -inf, 9.0]], [False, True], 5)
    given_settings = {
        "initial": 2,
        "signal": "",
        "side": "after",
        "among": "all",
        "width": 1,
        "discount": 0,
        "bounds": (),
    }
    growth = positions(tree, **{**given_settings, **changes})  # type: ignore[arg-type]
    assert next(growth) == [ROOT, ROOT]
    assert next(growth) == at(*expected)


def test_few_positions_are_gone_through_again_and_none_gives_none() -> None:
    inf = math.inf
    few = scored_tree([[-inf, 1.0, 2.0, -inf]], [False], 6)
    settings_of = {
        "initial": 1,
        "signal": "",
        "side": "before",
        "among": "all",
        "width": 1,
        "discount": 0,
        "bounds": (),
    }
    growth = positions(few, **settings_of)  # type: ignore[arg-type]
    next(growth)
    assert next(growth) == at((0, 7), (0, 4), (0, 7), (0, 4), (0, 7))
    none = scored_tree([[-inf] * 4], [False], 6)
    growth = positions(none, **settings_of)  # type: ignore[arg-type]
    next(growth)
    assert next(growth, None) is None


@properties
@given(st.integers(0, 10_000), st.sampled_from(["before", "after"]))
def test_positions_are_ranked_by_score_then_in_order(seed: int, side: Any) -> None:
    draws = np.random.default_rng(seed)
    sampled = [np.flatnonzero(draws.random(12) < 0.6) for _ in range(3)]
    scores = [np.where(draws.random(12) < 0.3, -np.inf, draws.integers(0, 4, 12)) for _ in range(3)]
    found = []
    for row, places in enumerate(sampled):
        for number, token in enumerate(places.tolist()):
            target = number if side == "before" else number + 1
            if target < len(places) and np.isfinite(scores[row][token]):
                found.append((scores[row][token], row, int(places[target])))
    expected = [(row, split) for _, row, split in sorted(found, key=lambda item: (-item[0], item[1], item[2]))]
    assert ranked_positions(scores, sampled, side) == expected


# ------------------------------------------------------------------------------------------------------------ signals


def independent_table(seed: int = 0) -> Trajectories:
    changed = lake()
    return planted(changed, slots.Independent(), specs=iteration_specs(changed, NAME, seed, 0))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 500), st.sampled_from([0.0, 0.9, 0.99, 1.0]), st.sampled_from([(0.8, 1.2), (0.1, 4.0)]))
def test_appos_score_is_that_of_loops(seed: int, discount: float, bounds: tuple[float, float]) -> None:
    table = independent_table(seed % 7)
    moved = np.random.default_rng(seed).normal(0, 0.3, len(table.input_ids))
    leads = np.ones(len(moved))
    for episode in range(len(table)):
        chosen = [t for t in range(table.offsets[episode], table.offsets[episode + 1]) if table.sampled[t]]
        for i, t in enumerate(chosen):
            total = sum(discount**k * moved[later] for k, later in enumerate(chosen[i:]))
            leads[t] = min(max(math.exp(total), bounds[0]), bounds[1])
    np.testing.assert_allclose(omega(table, moved, discount, bounds), leads, rtol=1e-9)

    scores = branch_scores("branching_score", table, np.random.default_rng(0), moved, discount, bounds)
    for group in set(table.groups.tolist()):
        members = [t for t, e in enumerate(table.token_episode) if table.groups[e] == group and table.sampled[t]]
        z = {}
        for name, values in (("entropy", table.entropy.astype(float)), ("omega", leads)):
            own = [values[t] for t in members]
            mean = sum(own) / len(own)
            spread = math.sqrt(sum((value - mean) ** 2 for value in own) / len(own))
            z[name] = {t: (values[t] - mean) / spread for t in members}
        qualified = [t for t in members if z["entropy"][t] > 0 and z["omega"][t] > 0]
        assert qualified
        assert np.flatnonzero(np.isfinite(scores[members])).tolist() == [members.index(t) for t in qualified]
        for t in qualified:
            assert scores[t] == pytest.approx(z["entropy"][t] * z["omega"][t])
    assert not np.isfinite(scores[~table.sampled]).any()


def test_where_no_token_qualifies_the_best_product_is_the_only_position() -> None:
    """Entropy high exactly where Omega is low; then a policy that has not moved at all."""
    made = build([lone_episode([0.0, 1.0, 3.0, 4.0])])
    against = np.array([0, 0, 0, 0.1, 0.05, -0.04, -0.11])
    scores = branch_scores("branching_score", made, np.random.default_rng(0), against, 0.0)
    assert np.flatnonzero(np.isfinite(scores)).tolist() == [
        5
    ]  # of entropies 0, 1, 3, 4 the products -1.9, -.3, -.2, -1.6
    still = branch_scores("branching_score", made, np.random.default_rng(0), np.zeros(7), 0.99)
    assert np.isfinite(still).sum() == 1


def lone_episode(entropies: Sequence[float]) -> EpisodeBuilder:
    names = ("episode_id", "group_id", "environment", "state_key")
    builder = EpisodeBuilder(**dict.fromkeys(names, "e"), seed=0, iteration=0, policy_version=0)
    builder.append_text([1, 2, 3], Role.PROMPT)
    say(builder, [entropies])
    builder.finish(False, "turns")
    return builder


def test_signals_score_sampled_tokens_alone() -> None:
    table = independent_table()
    draws = lambda: np.random.default_rng(5)  # noqa: E731
    entropy = branch_scores("entropy", table, draws())
    np.testing.assert_array_equal(entropy, np.where(table.sampled, table.entropy.astype(np.float64), -np.inf))
    anywhere = branch_scores("random", table, draws())
    np.testing.assert_array_equal(np.isfinite(anywhere), table.sampled)
    starts = branch_scores("action_start", table, draws())
    np.testing.assert_array_equal(np.isfinite(starts), action_starts(table))
    expected = []
    for row, base in zip(rows(table), table.offsets, strict=False):
        for turn in row["turns"]:
            own = [t for t in range(turn["start"], turn["end"]) if row["role"][t] == Role.ACTION and row["sampled"][t]]
            expected += [int(base) + t for t in own[:1]]
    assert np.flatnonzero(action_starts(table)).tolist() == expected
    assert expected
    with pytest.raises(ValueError, match="not annotated"):
        branch_scores("reference_energy", table, draws())
    with pytest.raises(ValueError, match="policy that has moved"):
        branch_scores("branching_score", table, draws())


# -------------------------------------------------------------------------------------------------------- a real engine


@pytest.fixture(scope="module", params=[8, 16], ids=["torch", "kernel"])
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Heads of 8 numbers attend through PyTorch, those of 16 through the native kernel, where there is a compiler."""
    return random_policy("qwen2", request.param, tmp_path_factory.mktemp("speaker") / "policy")


GROWN = {
    "arpo": rise_section(initial=2, base=1.0, slope=0.0, threshold=0.65, penalty=0.2, tokens=3),
    "positions": positions_section(initial=2, side="after", width=1),
    "siblings": positions_section(initial=2, side="before", width=3),
    "search": search_section(2),
    "switch": switch_section(3, target=0.01, low=0.5, high=1.75),
}
SIZE = 8


def engine_of(policy: Policy, episodes_at_once: int = 2 * SIZE) -> TransformersEngine:
    return TransformersEngine(policy, episodes_at_once, policy_version=3)


def at_temperature(temperature: float) -> Config:
    changed = lake(group_size=SIZE)
    return changed.model_copy(
        update={"rollout": changed.rollout.model_copy(update={"temperature": temperature, "batch_episodes": 2 * SIZE})}
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("growth", GROWN)
def test_branches_have_the_log_probabilities_of_a_fresh_forward(
    speaker: Policy, growth: str, temperature: float
) -> None:
    changed = at_temperature(temperature)
    made = planted(changed, GROWN[growth], engine_of(speaker), speaker.tokenizer)
    assert_forest(made, changed, iteration_specs(changed, NAME, 0, 0), speaker.tokenizer)
    branches = int((made.parents >= 0).sum())
    assert (branches == 0) if growth == "switch" else (branches >= 6)
    assert (set(made.episodes["temperature"]) == {temperature, 0.5}) == (growth == "switch")
    if growth in ("arpo", "search"):
        assert (made.parents[made.parents[made.parents >= 0]] >= 0).any()  # a branch of a branch
    for own in dict.fromkeys(made.episodes["temperature"]):
        chosen = made.select([e for e, other in enumerate(made.episodes["temperature"]) if other == own])
        logprob, entropy, _ = score_trajectories(speaker, chosen, own, 4096)
        np.testing.assert_allclose(chosen.logprob, logprob, atol=1e-4)
        np.testing.assert_allclose(chosen.entropy, entropy, atol=1e-4)


def least_positions(wave: Trajectories) -> int:
    """A branch's tokens after its split, but the last, which nobody continues; and for all that continue one prefix
    together its last token once: what a cache holds of it is not what comes after it."""
    table = rows(wave)
    continued = {(tuple(row["input_ids"][: row["split"]])) for row in table}
    return len(continued) + sum(len(row["input_ids"]) - row["split"] - 1 for row in table)


@pytest.mark.parametrize("growth", ["arpo", "positions", "siblings", "search"])
def test_a_branch_costs_the_tokens_after_its_split(speaker: Policy, growth: str) -> None:
    """Observations among them; nothing before it but one position, which is less than any block of a cache."""
    changed, engine = at_temperature(1.0), engine_of(speaker)
    setup = Setup(speaker.tokenizer, changed, NAME)
    forest = Forest(engine, setup, iteration_specs(changed, NAME, 0, 0), GROWN[growth], 1.0)
    before, branches, after_splits = 0, 0, 0
    for number, wave in enumerate(grow(forest)):
        spent, before = engine.positions_computed - before, engine.positions_computed
        if number == 0:
            prompts = {tuple(row["input_ids"][row["role"] == Role.PROMPT]) for row in rows(wave)}
            own = sum(len(row["input_ids"]) - (row["role"] == Role.PROMPT).sum() - 1 for row in rows(wave))
            assert spent == sum(map(len, prompts)) + own
        elif None in wave.episodes["split"]:
            assert growth == "arpo"  # what is left of a budget
        else:
            assert spent == least_positions(wave)
            after_splits += int(sum(wave.lengths - wave.splits))
            branches += len(wave)
            assert spent <= sum(wave.lengths - wave.splits)
    assert branches >= 6
    assert after_splits < 0.9 * sum(sum(len(e.builder) for e in tree.episodes[2:]) for tree in forest.trees)


@pytest.mark.parametrize("growth", ["arpo", "siblings", "search", "switch"])
def test_fewer_slots_cost_positions_and_change_no_token(speaker: Policy, growth: str) -> None:
    changed = at_temperature(1.0)
    specs = iteration_specs(
        changed, NAME, 1, 0
    )  # none of whose draws falls on a border between tokens, within rounding
    engines = {count: engine_of(speaker, count) for count in (128, 2 * SIZE, 3)}
    tables = {count: planted(changed, GROWN[growth], own, speaker.tokenizer, specs) for count, own in engines.items()}
    enough = tables[2 * SIZE]
    for count, made in tables.items():
        for name in ("episode_id", "parent", "split", "temperature", "return", "end_reason"):
            assert made.episodes[name] == enough.episodes[name]
        np.testing.assert_array_equal(made.input_ids, enough.input_ids)
        np.testing.assert_allclose(made.logprob, enough.logprob, atol=1e-4)
        np.testing.assert_allclose(made.entropy, enough.entropy, atol=1e-4)
        least = engines[2 * SIZE].positions_computed
        assert engines[count].positions_computed == least if count > 3 else engines[count].positions_computed >= least


UNBRANCHED = {
    "none": slots.Independent(),
    "arpo": rise_section(initial=SIZE),
    "positions": positions_section(initial=SIZE),
    "search": search_section(SIZE),
    "switch": switch_section(SIZE),
}


@pytest.mark.parametrize("growth", UNBRANCHED)
def test_without_branches_a_forest_is_the_table_of_the_independent_engine(
    speaker: Policy, growth: str, tmp_path: Path
) -> None:
    """Byte for byte."""
    changed = at_temperature(0.8)
    specs = iteration_specs(changed, NAME, 0, 0)
    collect(engine_of(speaker), speaker.tokenizer, changed, NAME, specs, 0.8).write(tmp_path / "independent")
    planted(changed, UNBRANCHED[growth], engine_of(speaker), speaker.tokenizer).write(tmp_path / "forest")
    assert (tmp_path / "forest").read_bytes() == (tmp_path / "independent").read_bytes()


NOWHERE = {
    "arpo": rise_section(initial=2, base=0.0, slope=0.0, threshold=0.5),
    "monitored": rise_section(initial="monitored", base=0.0, slope=0.0, threshold=0.5),
    "positions": positions_section(initial=3),
}


@pytest.mark.parametrize("growth", NOWHERE)
def test_a_forest_that_finds_no_place_to_branch_samples_what_the_independent_engine_samples(
    speaker: Policy, growth: str
) -> None:
    changed = at_temperature(1.0)
    specs = iteration_specs(changed, NAME, 0, 0)
    expected = collect(engine_of(speaker), speaker.tokenizer, changed, NAME, specs, 1.0)

    def nowhere(wave: Trajectories) -> np.ndarray:
        return np.full(len(wave.input_ids), -np.inf)

    made = planted(changed, NOWHERE[growth], engine_of(speaker), speaker.tokenizer, score=nowhere)
    assert made.episodes == expected.episodes
    assert made.turns == expected.turns
    np.testing.assert_array_equal(made.input_ids, expected.input_ids)
    np.testing.assert_allclose(made.logprob, expected.logprob, atol=1e-4)


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


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny reference policy is saved."""
    target = tmp_path_factory.mktemp("models") / "policy"
    supervised(configured()).save(target)
    return target


@pytest.fixture
def policy(directory: Path) -> Policy:
    """The tiny reference policy, to be trained."""
    return load_policy(directory)


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


def test_appos_omega_is_one_before_an_update_and_another_after_it(policy: Policy) -> None:
    changed = branching_config()
    (table,) = collection_of(policy, "grpo", changed).rounds(0)

    def leads() -> np.ndarray:
        now = score_trajectories(policy, table, 1.0, 4096)[0]
        return omega(table, now - table.logprob, 0.99, (0.8, 1.2))

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
        found = list(collection_of(policy, method, branching_config()).rounds(1))
        assert [len(episodes) for episodes in found] == ([4, 8] if method == "appo" else [8])
        assert all(episodes.annotated for episodes in found)
        assert set(found[-1].episodes["iteration"]) == {1}
        if method == "appo":
            again = found[1].select([e for e, parent in enumerate(found[1].parents) if parent < 0])
            assert again.to_table().equals(found[0].to_table())


def test_branches_after_an_update_are_sampled_by_the_policy_as_it_is_then(policy: Policy) -> None:
    """Nothing of their prefixes is left that the policy before it has computed."""
    rounds = collection_of(policy, "appo", branching_config()).rounds(0)
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
    tables = [list(collection_of(policy, method, changed).rounds(0))[-1] for changed in (few, many)]
    places = [list(zip(table.episodes["parent"], table.episodes["split"], strict=True))[:8] for table in tables]
    assert places[0] == places[1]
    assert any(split for _, split in places[0])


def test_what_was_sampled_at_another_temperature_is_trained_on_at_the_rollouts(policy: Policy) -> None:
    changed = branching_config()
    collection = collection_of(policy, "switch", changed)
    (sampled,) = collection.rounds(0)
    assert sampled.episodes["temperature"] == [1.0, 1.0, 2.0, 2.0] * 2
    trained = collection.at_temperature(sampled)
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
    assert module.last_episodes.to_table().equals(sampled.to_table())


# ------------------------------------------------------------------------------------------------- killed and run again


def killed_within_a_tree(task: TrainingTask) -> None:
    """Dies when the second iteration asks for the episodes after the initial ones."""
    wave = Forest.wave

    def fatal(forest: Forest) -> Trajectories | None:
        if forest.trees[0].specs[0].iteration == 1 and forest.order():
            os.kill(os.getpid(), signal.SIGKILL)
        return wave(forest)

    Forest.wave = fatal  # type: ignore[method-assign]
    train_one(TrainingJob(task, None, None), quiet)


def quiet(done: int, total: int, text: str = "") -> None:
    pass


def left(task: TrainingTask) -> dict[str, str]:
    """Hashes of a result's files but times."""
    return {
        path.relative_to(task.result).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(task.result.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


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
    assert left(killed) == left(straight)
    assert {"curves.json", "episodes.parquet", "policy/model.safetensors"} <= {*left(straight)}
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
        ({"branching": RISE, "weight": {"kind": "pivots"}}, "weight pivots is not defined on branches"),
    ],
)
def test_what_is_not_defined_on_trees_is_refused_in_a_line(slots_of: dict[str, Any], said: str) -> None:
    assert said in refusal(slots_of)


def refusal(method: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        configured({"methods": {"made": method}})
    message = str(caught.value)
    assert message.startswith("params.yaml: methods.made")
    assert "\n" not in message
    return message
