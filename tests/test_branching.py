"""Branching rollouts: what grows, whether branches are what they claim to be, what they cost, and trainings on them."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.energy.annotate import score_trajectories
from pipeline.environments import make
from pipeline.environments.making import EXTRAS
from pipeline.environments.playing import parse_action, reset, step
from pipeline.model.policy import Policy
from pipeline.progress.timing import Phases
from pipeline.rollout.branch_scores import omega
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Sampling
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.forest import Forest, branches_by_role
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.branching import Independent, Positions
from pipeline.settings.params import Config, Environment
from pipeline.settings.section import Section
from pipeline.training.collection import Collection
from pipeline.training.module import PolicyGradient
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import TrainingTask, training_task
from pipeline.trajectories.parsing import decode, token_roles
from pipeline.trajectories.table import read, to_table, write
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json
from pipeline.workspace.randomness import generator
from tests.batches import properties
from tests.forests import (
    Chatter,
    grow,
    lake,
    planted,
    positions_section,
    rise_section,
    rows,
    search_section,
    switch_section,
)
from tests.test_collector import NAME, TOKENIZER, config, says
from tests.test_contracts_kept import EXAMPLES, SOUND
from tests.test_engine import random_policy
from tests.trainings import LAKE, configured, fit, left, quiet
from tests.walks import Walk

# ------------------------------------------------------------------------------------- whole forests, without a model


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
    for section in (rise_section(initial=2), search_section(2), positions_section(initial=2), switch_section(3)):
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

    made = planted(changed, switch_section(4, target=5.0, high=1.75), Noting())
    assert made.episodes["temperature"] == [1.0, 1.0, 1.0, 1.0, 1.75, 1.75] * 2
    assert asked_for == [1.0, 1.75]
    assert (made.parents == -1).all()


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


# ---------------------------------------------------------------------------- environments: copied, or led there again


def random_action(environment: Any, draws: np.random.Generator) -> str:
    """The expert's; TextArena's games have none, and this one takes guesses."""
    expert = getattr(sys.modules[type(environment).__module__], "expert", None)
    text = expert().random_action(environment, draws) if expert else f"[{draws.integers(1, 21)}]"
    return str(parse_action(environment, text))


@pytest.mark.parametrize("name", [*SOUND, *EXTRAS])
def test_a_replayed_environment_is_the_one_that_was_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every turn and token: what a deep copy made then answers to the same actions, a branch's environment answers."""
    if name in EXTRAS and importlib.util.find_spec(EXTRAS[name][1].replace("-", "_")) is None:
        pytest.skip(f"{EXTRAS[name][1]} is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    limits = {"max_turns": 9, "response_tokens": 400, "context_tokens": 100_000, "actions_per_turn": 2}
    section = SOUND.get(name, Environment(id=name)).model_copy(update=limits)
    setup, compared = Setup(TOKENIZER, config().model_copy(update={"environments": {NAME: section}}), NAME), 0
    for state in range(3):
        draws = np.random.default_rng(state)
        spec = EpisodeSpec(str(state), str(state), state, 0, 0, 70 + state, (0, "tokens", state))
        episode, copies = Episode(setup, spec), list[Any]()
        while not episode.done:
            copies.append((copy.deepcopy(episode.environment), episode.observation))
            actions = [random_action(episode.environment, draws) for _ in range(2)]
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
    setup = Setup(TOKENIZER, changed, NAME)
    said = TOKENIZER(says("left"), add_special_tokens=False)["input_ids"]
    refusals = []
    for state in range(20):
        episode = Episode(setup, EpisodeSpec("e", "g", state, 0, 0, state, (0, "t")))
        while not episode.done:
            episode.take(Continuation(said, [0.0] * len(said), [0.0] * len(said), "stop", 0))
        try:
            branch_of(episode, episode.builder.turns[-1]["start"])
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) >= 5
    assert set(refusals) == {
        "environments: 'Forgetful-v0' does not come to the same state by the same actions and seeds, so that no episode of "
        "it can be continued; its noise must come from the seed of reset alone"
    }


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
    "none": Independent(),
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
    write(collect(engine_of(speaker), speaker.tokenizer, changed, NAME, specs, 0.8), tmp_path / "independent")
    write(planted(changed, UNBRANCHED[growth], engine_of(speaker), speaker.tokenizer), tmp_path / "forest")
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
        ({"branching": RISE, "weight": {"kind": "pivots"}}, "weight pivots is not defined on branches"),
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
