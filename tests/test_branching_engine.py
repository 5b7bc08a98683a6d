"""Branches of environments that are led there again, and of a real engine's episodes."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from pipeline.energy.annotate import score_trajectories
from pipeline.environments.making import EXTRAS
from pipeline.environments.playing import parse_action, step
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.forest import Forest
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.branching import Independent
from pipeline.settings.params import Config, Environment
from pipeline.trajectories.table import write
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.errors import UserError
from tests.branching_cases import assert_forest, branch_of
from tests.forests import (
    grow,
    lake,
    planted,
    positions_section,
    rise_section,
    rows,
    search_section,
    shift_section,
)
from tests.test_collector import NAME, TOKENIZER, config, says
from tests.test_contracts_kept import EXAMPLES, SOUND
from tests.test_engine import random_policy
from tests.walks import Walk

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
    "shift": shift_section(0.625, target=0.0, low=0.4, high=0.5),
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
    assert (branches == 0) if growth == "shift" else (branches >= 6)
    assert (set(made.episodes["temperature"]) == {temperature, 0.5}) == (growth == "shift")
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


@pytest.mark.parametrize("growth", ["arpo", "siblings", "search", "shift"])
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
    "shift": shift_section(1e-9),
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
