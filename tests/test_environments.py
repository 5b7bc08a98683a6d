"""Every registered environment in a rollout and in splits, and FrozenLake's own rules.

What any environment has to keep is in pipeline/contracts/environment/, which test_contracts.py runs over all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import DOWN, LEFT, RIGHT, UP, FrozenLakeEnv

from pipeline.bootstrap.demonstrations import expert_of
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.environments import initial_states, make, split_of
from pipeline.environments.frozen_lake import MOVES, FrozenLake, FrozenLakeExpert
from pipeline.environments.making import OURS
from pipeline.environments.splits import SPLITS
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.params import Config, Environment, parse
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
SLIPPERY = Environment(
    id="actfocus/FrozenLake-v1",
    settings={"frozen": 0.9, "success_rate": 0.8},
    layout="published",
    max_turns=5,
    actions_per_turn=2,
)
SECTIONS = {name: Environment(id=name) for name in OURS} | {"slippery FrozenLake": SLIPPERY}


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


# ----------------------------------------------------------------------------------------------------- any environment


def test_stepping_before_a_reset_and_after_the_end_raises(section: Environment) -> None:
    environment: Any = make(section)
    expert, draws = expert_of(environment), np.random.default_rng(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="call reset"):
            environment.step("anything")
        environment.reset(seed=0)
        while not environment.done:
            environment.step(expert.act(environment, draws))


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

    def sync(self, policy: Policy, version: int) -> None: ...

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
    with pytest.raises(UserError, match=r"^environments: only \d+ of 13 initial states found in split 'test'$"):
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
    for state in range(1000):
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


@pytest.mark.parametrize("success_rate", [1.0, 0.8])
@pytest.mark.parametrize(("size", "state"), [(2, 0), (3, 1), (4, 2), (4, 3)])
def test_moves_follow_gymnasiums_own_table(size: int, state: int, success_rate: float) -> None:
    """From every cell, by every action: the same cells, rewards and ends, at shares within five standard errors.

    A slip that the table has is met: its chance is 0.1 or more, and 0.9 ** 200 is less than 1e-9.
    """
    environment, times = lake(size=size, frozen=0.75, success_rate=success_rate), 200 if success_rate < 1 else 3
    environment.reset(seed=0, options={"state_seed": state})
    desc = environment.state_key.split("@")[0].split("/")
    table = FrozenLakeEnv(desc=desc, is_slippery=success_rate < 1, success_rate=success_rate).P
    numbers = {"Left": LEFT, "Down": DOWN, "Right": RIGHT, "Up": UP}
    for cell, (name, number) in product(range(size**2), numbers.items()):
        start = divmod(cell, size)
        if start in environment.holes or start == environment.goal:
            continue
        expected, met = Counter[Any](), Counter[Any]()
        for chance, successor, reward, terminated in table[cell][number]:
            expected[divmod(successor, size), reward, terminated] += chance
        for noise in range(times):
            environment.reset(seed=times * (4 * cell + number) + noise, options={"state_seed": state})
            environment.start = environment.player = start
            _, reward, terminated, _, _ = environment.step(name)
            met[environment.player, reward, terminated] += 1
        assert set(met) == set(expected)
        for outcome, chance in expected.items():
            assert abs(met[outcome] / times - chance) <= 5 * (chance * (1 - chance) / times) ** 0.5


@pytest.mark.parametrize("text", ["Up", " up ", "DOWN\n", "left", "\tRight"])
def test_moves_are_parsed_in_any_case(text: str) -> None:
    assert lake().parse_action(text) == text.strip().title()


@pytest.mark.parametrize("text", ["U", "up up", "fly to the moon", "0", "√"])
def test_anything_else_is_no_move(text: str) -> None:
    assert lake().parse_action(text) is None


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
        ({"size": 1}, "size must be a whole number from 2 to 10, got 1"),
        ({"size": 11}, "size must be a whole number from 2 to 10, got 11"),
        ({"size": "big"}, "refuses its settings"),
        ({"frozen": 0}, "frozen must be in"),
        ({"success_rate": 0.2}, "success_rate must be in"),
        ({"least_distance": 7}, "least_distance must be a whole number from 1 to 6, got 7"),
        ({"least_distance": 4, "max_actions": 3}, "least_distance must be a whole number from 1 to 3, got 4"),
        ({"max_actions": 0}, "max_actions must be a whole number from 1 on, got 0"),
        ({"grid": "sometimes"}, "grid must be always, first or never, got 'sometimes'"),
        ({"frozn": 0.8}, "frozn"),
        (
            {"size": 8, "frozen": 0.02, "least_distance": 12, "max_actions": 12},
            "no lake found with size 8, frozen 0.02",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
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
    with pytest.raises(UserError, match=said) as error:
        make(Environment(id=name))
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)
