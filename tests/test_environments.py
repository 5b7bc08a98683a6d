"""The contract of every registered environment, and FrozenLake's own rules.

The first part holds for any text environment: to check one of your own, add its section to ``SECTIONS``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from pipeline.config import Config, ConfigError, Environment, parse, read_yaml
from pipeline.environments import initial_states, make, split_of
from pipeline.environments.frozen_lake import MOVES, FrozenLake, FrozenLakeExpert
from pipeline.environments.registry import SPLITS
from pipeline.policy.bootstrap import expert_of
from pipeline.policy.tokenizer import train_tokenizer
from pipeline.rollout.collector import collect, iteration_specs
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling

ROOT = Path(__file__).parents[1]
SLIPPERY = Environment(
    id="actfocus/FrozenLake-v1",
    settings={"frozen": 0.9, "success_rate": 0.8},
    layout="published",
    max_turns=5,
    actions_per_turn=2,
)
SECTIONS = {name: Environment(id=name) for name in sorted(gymnasium.registry) if name.startswith("actfocus/")}
SECTIONS |= {"slippery FrozenLake": SLIPPERY}
STATES = range(20)


@pytest.fixture(params=SECTIONS.values(), ids=SECTIONS.keys())
def section(request: pytest.FixtureRequest) -> Environment:
    return request.param


def opening(environment: Any, seed: int, state_seed: int | None = None) -> tuple[str, str, str]:
    """What an episode shows before its first action."""
    options = {} if state_seed is None else {"options": {"state_seed": state_seed}}
    observation, _ = environment.reset(seed=seed, **options)
    return observation, environment.instructions, environment.state_key


def play(environment: Any, seed: int, state_seed: int, actions: Sequence[str]) -> list[tuple[str, float, bool, bool]]:
    """What follows from actions, up to the episode's end."""
    environment.reset(seed=seed, options={"state_seed": state_seed})
    seen: list[tuple[str, float, bool, bool]] = []
    for action in actions:
        observation, reward, terminated, truncated, _ = environment.step(action)
        seen.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            break
    return seen


def some_actions(section: Environment, seed: int, count: int) -> list[str]:
    draws, expert = np.random.default_rng(seed), expert_of(make(section))
    return [expert.random_action(draws) for _ in range(count)]


# ------------------------------------------------------------------------------------- the contract of any environment


def test_the_same_seed_gives_the_same_opening_and_two_seeds_differ(section: Environment) -> None:
    one, other = make(section), make(section)
    openings = [opening(one, seed) for seed in STATES]
    assert openings == [opening(other, seed) for seed in STATES]
    assert openings == [opening(one, seed) for seed in STATES]
    assert len(set(openings)) > len(STATES) / 2


def test_a_state_seed_decides_the_opening_whatever_the_noise(section: Environment) -> None:
    environment = make(section)
    openings = [{opening(environment, noise, state) for noise in range(5)} for state in STATES]
    assert all(len(members) == 1 for members in openings)
    assert len(set.union(*openings)) > len(STATES) / 2


def test_state_noise_and_actions_decide_the_episode(section: Environment) -> None:
    one, other = make(section), make(section)
    for state in STATES:
        actions = some_actions(section, state, 10)
        assert play(one, 7, state, actions) == play(other, 7, state, actions)


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, Any]:
    """Openings and split of every environment in a process with another hash seed, and the modules it has imported."""
    program = """
import json, sys
from pipeline.config import Environment
from pipeline.environments import make, split_of
openings, splits = {}, {}
for name, raw in json.load(sys.stdin).items():
    environment, found = make(Environment(**raw)), []
    for seed in range(5):
        for state in (None, seed):
            observation, _ = environment.reset(seed=seed, options=None if state is None else {"state_seed": state})
            found.append([observation, environment.instructions, environment.state_key])
    openings[name], splits[name] = found, [split_of(key) for _, _, key in found]
print(json.dumps({"openings": openings, "splits": splits, "modules": sorted(sys.modules)}))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    given = json.dumps({name: section.model_dump() for name, section in SECTIONS.items()})
    done = subprocess.run(
        [sys.executable, "-c", program], input=given, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SECTIONS)
def test_another_process_under_another_hash_seed_sees_the_same(name: str, elsewhere: dict[str, Any]) -> None:
    environment = make(SECTIONS[name])
    here = [opening(environment, seed, state) for seed in range(5) for state in (None, seed)]
    assert [tuple(found) for found in elsewhere["openings"][name]] == here
    assert elsewhere["splits"][name] == [split_of(key) for _, _, key in here]


@pytest.mark.parametrize("library", ["matplotlib", "pygame", "torch"])
def test_environments_import_no_heavy_library(library: str, elsewhere: dict[str, Any]) -> None:
    assert library not in elsewhere["modules"]


def test_no_reward_for_undoing_and_redoing(section: Environment) -> None:
    """A state met again has been paid for: what lies between the two visits earns nothing."""
    environment, met = make(section), 0
    for state in range(60):
        environment.reset(seed=state, options={"state_seed": state})
        earned, first = 0.0, {environment.state_key: 0.0}
        for action in some_actions(section, state, 50):
            _, reward, terminated, truncated, _ = environment.step(action)
            earned += reward
            met += environment.state_key in first
            assert earned <= first.setdefault(environment.state_key, earned) + 1e-9
            if terminated or truncated:
                break
    assert met > 0, "no state was met twice: the check was empty"


def test_stepping_after_the_end_and_before_a_reset_raises(section: Environment) -> None:
    environment, (action,) = make(section), some_actions(section, 0, 1)
    with pytest.raises(Exception, match=r"reset"):
        environment.step(action)
    for state in STATES:
        seen = play(environment, 0, state, some_actions(section, state, 500))
        assert seen[-1][2] or seen[-1][3], "the environment's own limit must end an episode"
        with pytest.raises(RuntimeError, match=r"reset"):
            environment.step(action)


def test_parsed_actions_are_canonical_and_anything_else_is_none(section: Environment) -> None:
    environment = make(section)
    for state in STATES:
        environment.reset(seed=0, options={"state_seed": state})
        for text in ("", " ", "fly to the moon", "||", "<answer>", "\n", "0", "x" * 500, "√"):
            assert environment.parse_action(text) is None
        allowed = [environment.parse_action(action) for action in some_actions(section, state, 20)]
        assert any(allowed)
        for action in filter(None, allowed):
            assert environment.parse_action(action) == action
            assert environment.parse_action(f" {action}\n") == action


def test_the_expert_solves_what_is_solvable(section: Environment) -> None:
    """On some noise out of 20; without noise, at once."""
    environment, draws = make(section), np.random.default_rng(0)
    for state in STATES:
        for noise in range(20):
            environment.reset(seed=noise, options={"state_seed": state})
            done = False
            while not done:
                action = expert_of(environment).act(environment, draws)
                assert environment.parse_action(action) == action
                _, _, terminated, truncated, _ = environment.step(action)
                done = terminated or truncated
            if environment.success:
                break
        assert environment.success


def test_observations_and_actions_fit_their_spaces(section: Environment) -> None:
    environment: Any = make(section)
    for state in STATES:
        observation, _ = environment.reset(seed=0, options={"state_seed": state})
        shown = [observation, *(seen[0] for seen in play(environment, 0, state, some_actions(section, state, 50)))]
        assert max(map(len, shown)) <= environment.observation_space.max_length


class Repeating:
    """An engine that always answers the same."""

    policy_version = 0

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._ids = list(tokenizer(text)["input_ids"])

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        return [self._converse(number, request, follow) for number, request in enumerate(requests)]

    def forget(self) -> None: ...

    def _converse(self, number: int, request: Request | None, follow: Follow | None) -> Continuation:
        while request is not None:
            ids = self._ids[: len(request.uniforms)]
            answer = Continuation(ids, [-1.0] * len(ids), [1.0] * len(ids), "stop", 0)
            request = follow(number, answer) if follow else None
        return answer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["<think>careful</think><answer>fly</answer>", "player 0 0 goal 3 3"], 300)


def config_with(section: Environment) -> Config:
    raw = read_yaml(ROOT / "params.yaml")
    raw |= {"environments": {"mine": section.model_dump()}, "bottleneck": {"groups": 2}}
    raw["rollout"] = {"groups": 2, "group_size": 4, "batch_episodes": 3}
    raw["train"] = {"minibatch": 4}
    return parse(raw)


@pytest.mark.parametrize("text", ["?", "<think></think><answer>fly</answer>", "<answer></answer>", "<think>" * 9])
def test_invalid_actions_end_the_episode_in_bounded_time(section: Environment, tokenizer: Any, text: str) -> None:
    section = section.model_copy(update={"context_tokens": 100_000})
    config = config_with(section)
    played = collect(Repeating(tokenizer, text), tokenizer, config, "mine", iteration_specs(config, "mine", 0, 0), 1.0)
    assert played.episodes["end_reason"] == ["turns"] * 8
    assert set(np.diff(played.turn_offsets)) == {section.max_turns}
    assert not any(played.turns["valid"])
    assert set(played.turns["action"]) == {""}
    np.testing.assert_allclose(played.returns, section.max_turns * section.format_penalty)
    before = np.repeat(np.array(played.episodes["state_key"]), section.max_turns)
    assert list(before) == played.turns["state_key"]


def test_a_groups_members_share_state_and_prompt_but_neither_noise_nor_draws(
    section: Environment, tokenizer: Any
) -> None:
    config = config_with(section)
    specs = iteration_specs(config, "mine", 3, 1)
    assert len({spec.noise for spec in specs}) == len({spec.episode_id for spec in specs}) == 8
    assert len({spec.draws for spec in specs}) == 8
    assert Counter(spec.group_id for spec in specs) == dict.fromkeys({spec.group_id for spec in specs}, 4)
    played = collect(Repeating(tokenizer, "?"), tokenizer, config, "mine", iteration_specs(config, "mine", 3, 1), 1.0)
    assert len(set(zip(played.episodes["group_id"], played.episodes["state_key"], strict=True))) == 2
    assert {split_of(key) for key in played.episodes["state_key"]} == {"train"}


# -------------------------------------------------------------------------------------------------------------- splits


def test_splits_have_about_their_shares_and_depend_on_the_state_alone() -> None:
    keys = [f"state {number}" for number in range(20_000)]
    count = Counter(map(split_of, keys))
    assert [split_of(key) for key in keys[:100]] == [split_of(key) for key in keys[:100]]
    for split, share in SPLITS.items():
        assert abs(100 * count[split] / len(keys) - share) < 1.2
    assert sum(SPLITS.values()) == 100


def test_splits_never_change() -> None:
    """A trained policy would otherwise be tested on what it was trained on."""
    expected = ["demonstrations", "train", "train", "train", "train", "validation", "demonstrations", "test"]
    assert [split_of(f"state {number}") for number in range(8)] == expected


def test_initial_states_of_two_splits_are_disjoint(section: Environment) -> None:
    environment, keys = make(section), {}
    for split in SPLITS:
        found = initial_states(environment, split, 30, np.random.default_rng(1))
        keys[split] = {opening(environment, 0, state)[2] for state in found}
        assert {split_of(key) for key in keys[split]} == {split}
    assert len(set.union(*keys.values())) == sum(map(len, keys.values()))


def test_initial_states_are_distinct_when_they_have_to_be() -> None:
    section = Environment(id="actfocus/FrozenLake-v1", settings={"size": 2})
    environment = make(section)
    for distinct in (False, True):
        found = initial_states(environment, "train", 12, np.random.default_rng(0), distinct=distinct)
        states = {opening(environment, 0, state)[2] for state in found}
        assert (len(states) == 12) == distinct
    with pytest.raises(ConfigError, match=r"^environments: only \d+ of 13 initial states found in split 'test'$"):
        initial_states(environment, "test", 13, np.random.default_rng(0), distinct=True)


# ---------------------------------------------------------------------------------------------------------- FrozenLake


def lake(**settings: Any) -> FrozenLake:
    made = make(Environment(id="actfocus/FrozenLake-v1", settings=settings))
    assert isinstance(made, FrozenLake)
    return made


def test_the_expert_always_solves_a_deterministic_lake() -> None:
    environment, expert, draws = (
        lake(frozen=0.8, least_distance=2, max_actions=8),
        FrozenLakeExpert(),
        np.random.default_rng(0),
    )
    for state in range(200):
        environment.reset(seed=state, options={"state_seed": state})
        shortest, done, total = environment.distances()[environment.player], False, 0.0
        assert 2 <= shortest <= 8
        while not done:
            _, reward, terminated, truncated, _ = environment.step(expert.act(environment, draws))
            total, done = total + reward, terminated or truncated
        assert environment.success
        assert (total, environment.max_actions - environment.actions_left) == (1.0, shortest)


@pytest.mark.parametrize("size", [4, 7])
def test_every_number_of_the_prompt_matches_the_instance(size: int) -> None:
    environment = lake(size=size, frozen=0.75, max_actions=9)
    draws = np.random.default_rng(size)
    ended: Counter[str] = Counter()
    for state in range(60):
        observation, _ = environment.reset(seed=state, options={"state_seed": state})
        text = environment.instructions
        assert f"{size}x{size} cells" in text
        assert f"from (0, 0), top left, to ({size - 1}, {size - 1}), bottom right" in text
        assert "You have 9 actions." in text
        assert text.count("x") >= 1
        assert set(re.findall(r"\d+", text)) == {str(size), "0", str(size - 1), "9"}
        assert_shows(environment, observation)
        done = False
        while not done:
            observation, _, terminated, truncated, _ = environment.step(list(MOVES)[int(draws.integers(4))])
            assert_shows(environment, observation)
            done = terminated or truncated
        ended["goal" if environment.success else "hole" if environment.player in environment.holes else "limit"] += 1
    assert min(ended[end] for end in ("goal", "hole", "limit")) > 0


def assert_shows(environment: FrozenLake, observation: str) -> None:
    """Grid and coordinates describe the lake as it is."""
    *rows, coordinates = observation.split("\n")
    grid = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row.split(" "))}
    assert len(grid) == environment.size**2
    player = "X" if environment.player in environment.holes else "√" if environment.player == environment.goal else "P"
    for cell, symbol in grid.items():
        fixed = "G" if cell == environment.goal else "O" if cell in environment.holes else "_"
        assert symbol == (player if cell == environment.player else fixed)
    match = re.fullmatch(r"player (\d) (\d) goal (\d) (\d) holes((?: \d \d)+| none)", coordinates)
    assert match is not None
    assert (int(match[1]), int(match[2])) == environment.player
    assert (int(match[3]), int(match[4])) == environment.goal
    numbers = list(map(int, match[5].replace("none", "").split()))
    assert set(zip(numbers[::2], numbers[1::2], strict=True)) == environment.holes


@pytest.mark.parametrize(
    ("grid", "drawn"), [("always", [True, True]), ("first", [True, False]), ("never", [False, False])]
)
def test_the_grid_is_drawn_when_asked_for(grid: str, drawn: list[bool]) -> None:
    environment = lake(grid=grid, frozen=1.0, least_distance=3)
    first, _ = environment.reset(seed=0)
    second, *_ = environment.step("Left")
    assert ["\n" in first, "\n" in second] == drawn


def test_start_and_goal_vary() -> None:
    environment = lake(max_actions=10)
    found = []
    for state in range(200):
        environment.reset(seed=0, options={"state_seed": state})
        found.append((environment.start, environment.goal))
    assert len({start for start, _ in found}) == len({goal for _, goal in found}) == 16


def test_a_lake_has_a_path_no_longer_than_its_actions_and_no_shorter_than_asked() -> None:
    environment = lake(size=5, frozen=0.7, least_distance=3, max_actions=5)
    for state in range(100):
        environment.reset(seed=0, options={"state_seed": state})
        assert 3 <= environment.distances()[environment.start] <= 5


def test_the_same_state_under_other_noise_takes_another_course() -> None:
    environment, actions = make(SLIPPERY), ["Right", "Down"] * 5
    for state in range(5):
        assert len({opening(environment, noise, state) for noise in range(30)}) == 1
        assert len({tuple(play(environment, noise, state, actions)) for noise in range(30)}) > 1


def test_without_slipping_noise_changes_nothing() -> None:
    environment, actions = lake(), ["Right", "Down", "Left", "Up"] * 3
    for state in range(5):
        assert len({tuple(play(environment, noise, state, actions)) for noise in range(10)}) == 1


@pytest.mark.parametrize("action", MOVES)
def test_moves_slip_to_either_side_as_often_as_success_rate_says(action: str) -> None:
    environment, episodes = lake(success_rate=0.8, frozen=1.0), 2000
    state = next(s for s in range(1000) if starts_inside(environment, s))
    moved: Counter[tuple[int, int]] = Counter()
    for noise in range(episodes):
        environment.reset(seed=noise, options={"state_seed": state})
        row, column = environment.player
        environment.step(action)
        moved[environment.player[0] - row, environment.player[1] - column] += 1
    order = list(MOVES)
    sides = [MOVES[order[(order.index(action) + turn) % 4]] for turn in (1, 3)]
    for step, chance in ((MOVES[action], 0.8), (sides[0], 0.1), (sides[1], 0.1)):
        assert abs(moved[step] / episodes - chance) < 4 * (chance * (1 - chance) / episodes) ** 0.5
    assert sum(moved.values()) == episodes
    assert len(moved) == 3


def starts_inside(environment: FrozenLake, state: int) -> bool:
    environment.reset(seed=0, options={"state_seed": state})
    return all(0 < position < environment.size - 1 for position in environment.player)


def test_reward_is_paid_at_the_goal_only() -> None:
    environment, draws = lake(frozen=0.7), np.random.default_rng(0)
    for state in range(60):
        environment.reset(seed=state)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = environment.step(list(MOVES)[int(draws.integers(4))])
            assert reward == float(environment.player == environment.goal) == float(environment.success)
            done = terminated or truncated
            assert terminated == (environment.player in environment.holes or environment.success)


def test_the_experts_reasoning_never_names_a_move_and_has_the_length_asked_for() -> None:
    environment, expert, draws = lake(frozen=0.7), FrozenLakeExpert(), np.random.default_rng(0)
    said: Counter[str] = Counter()
    for state in range(300):
        environment.reset(seed=state)
        for words in (0, 1, 5, 14, 40):
            reasoning = expert.reason(environment, words, draws)
            assert len(reasoning.split()) == words
            assert not re.search(r"\b(left|right|up|down)(wards?)?\b", reasoning, re.IGNORECASE)
            said.update([reasoning])
    assert len(said) > 800


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 1}, "size must be 2 to 10, got 1"),
        ({"size": 11}, "size must be 2 to 10, got 11"),
        ({"size": "big"}, "refuses its settings"),
        ({"frozen": 0}, "frozen must be in"),
        ({"success_rate": 0.2}, "success_rate must be in"),
        ({"least_distance": 7}, "least_distance must be 1 to 6, got 7"),
        ({"least_distance": 4, "max_actions": 3}, "least_distance must be 1 to 3, got 4"),
        ({"max_actions": 0}, "max_actions must be at least 1, got 0"),
        ({"grid": "sometimes"}, "grid must be always, first or never, got 'sometimes'"),
        ({"frozn": 0.8}, "frozn"),
        (
            {"size": 8, "frozen": 0.02, "least_distance": 12, "max_actions": 12},
            "no lake found with size 8, frozen 0.02",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        lake(**settings).reset(seed=0)
    assert str(error.value).startswith("environments: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("actfocus/FrozenLakes-v1", "cannot be made"),
        ("no_such_module:Lake-v0", "cannot be made"),
        ("CartPole-v1", "lacks instructions, state_key, success, parse_action"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        make(Environment(id=name))
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)
