"""The bandit: clues, payoffs, groups, and the expert."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.environments import initial_states
from pipeline.environments.bandit import RISKY, SAFE, Bandit, BanditExpert
from pipeline.environments.splits import SPLITS


def started(state: int, seed: int = 0, **settings: Any) -> Bandit:
    environment = Bandit(**settings)
    environment.reset(seed=seed, options={"state_seed": state})
    return environment


def low_of(environment: Bandit) -> str:
    return next(arm for arm in environment.arms if arm != environment.high)


def spread(chance: float, count: int) -> float:
    """Four standard errors of a share."""
    return 4 * (chance * (1 - chance) / count) ** 0.5


# ------------------------------------------------------------------------------------------------------------ payoffs


@pytest.mark.parametrize(("settings", "chance", "pays"), [({}, 0.25, 1.0), ({"high_probability": 0.6}, 0.6, 1.0)])
def test_the_high_arm_pays_as_often_as_it_should(settings: dict[str, Any], chance: float, pays: float) -> None:
    environment, episodes, paid = Bandit(**settings), 4000, Counter[float]()
    for seed in range(episodes):
        environment.reset(seed=seed, options={"state_seed": seed % 7})
        _, reward, terminated, truncated, _ = environment.step(environment.high)
        assert (terminated, truncated, environment.done, environment.success) == (True, False, True, True)
        paid[reward] += 1
    assert set(paid) == {0.0, pays}
    assert abs(paid[pays] / episodes - chance) < spread(chance, episodes)


def test_the_low_arm_always_pays() -> None:
    for seed in range(300):
        environment = started(seed % 5, seed)
        _, reward, terminated, truncated, _ = environment.step(low_of(environment))
        assert (reward, terminated, truncated, environment.success) == (0.1, True, False, False)


def test_payoffs_are_what_the_settings_say() -> None:
    settings = {"low_reward": -2, "high_reward": 5, "high_probability": 1}
    environment = started(0, **settings)
    assert environment.step(environment.high)[:2] == (
        f"arms: {', '.join(environment.arms)}\n{environment.high} paid 5",
        5,
    )
    environment = started(0, **settings)
    assert environment.step(low_of(environment))[1] == -2


def test_a_groups_members_share_the_prompt_but_not_the_luck() -> None:
    """In RAGEN one group of 16 had 11 prompts. Sums over groups vary as those of independent payoffs do."""
    environment, sums = Bandit(), []
    for group in range(300):
        prompts, total = set(), 0.0
        for member in range(16):
            observation, _ = environment.reset(seed=1000 * group + member, options={"state_seed": group})
            prompts.add((environment.instructions, observation, environment.state_key, environment.high))
            total += environment.step(environment.high)[1]
        assert len(prompts) == 1
        sums.append(total)
    assert abs(np.mean(sums) - 16 * 0.25) < 4 * (3 / 300) ** 0.5
    assert abs(np.var(sums) - 16 * 0.25 * 0.75) < 4 * 3 * (2 / 300) ** 0.5


def test_luck_does_not_depend_on_the_names_even_where_both_seeds_are_equal() -> None:
    count, paid = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for seed in range(4000):
        environment = started(seed, seed)
        _, reward, *_ = environment.step(environment.high)
        words = [
            *environment.high.split(),
            *low_of(environment).split(),
            f"position {environment.arms.index(environment.high)}",
        ]
        for word in words:
            count["word", word] += 1
            paid["word", word] += int(reward)
    assert len(count) == 42
    for word, times in count.items():
        assert abs(paid[word] / times - 0.25) < spread(0.25, times)


# -------------------------------------------------------------------------------------------------------------- names


def test_one_name_is_of_each_kind_and_either_may_come_first() -> None:
    first, met = 0, set[str]()
    for state in range(2000):
        environment = started(state)
        for (adjectives, nouns), name in ((SAFE, low_of(environment)), (RISKY, environment.high)):
            adjective, noun = name.split()
            assert adjective in adjectives
            assert noun in nouns
            met |= {adjective, noun}
        first += environment.arms[0] == environment.high
    assert len(met) == 40
    assert abs(first / 2000 - 0.5) < spread(0.5, 2000)


def test_no_word_is_a_clue_for_both() -> None:
    words = [word for kind in (SAFE, RISKY) for part in kind for word in part]
    assert len(set(words)) == len(words) == 40


def test_there_are_plenty_of_states_in_every_split() -> None:
    assert len({started(state).state_key for state in range(2000)}) > 1800
    environment, keys = Bandit(), {}
    for split in SPLITS:
        seeds = initial_states(environment, split, 200, np.random.default_rng(0), distinct=True)
        keys[split] = {started(seed).state_key for seed in seeds}
    assert len(set.union(*keys.values())) == 800


def test_a_reset_takes_less_than_two_milliseconds() -> None:
    environment = Bandit()
    before = time.process_time()
    for state in range(300):
        environment.reset(seed=state, options={"state_seed": state})
    assert (time.process_time() - before) / 300 < 2e-3


# --------------------------------------------------------------------------------------------------------------- text


def test_the_observation_shows_the_arms_and_what_was_paid() -> None:
    environment = Bandit()
    observation, _ = environment.reset(seed=0, options={"state_seed": 0})
    assert observation == f"arms: {environment.arms[0]}, {environment.arms[1]}"
    low = low_of(environment)
    assert environment.actions_left == 1
    assert environment.step(low)[0] == f"{observation}\n{low} paid 0.1"
    assert environment.actions_left == 0


def test_the_instructions_have_the_settings_numbers_and_no_names() -> None:
    """They are the same for every instance: names are in the observation."""
    texts = {started(state, low_reward=0.3, high_reward=7, high_probability=0.5).instructions for state in range(20)}
    (text,) = texts
    assert re.findall(r"\d[\d.]*\b", text) == ["0.3", "7", "0.5", "0", "1"]
    assert not set(re.findall(r"\w+", text)) & {word for kind in (SAFE, RISKY) for part in kind for word in part}


def test_a_name_or_a_position_in_any_case_and_spacing_is_an_action_and_nothing_else() -> None:
    environment = started(0)
    for place, name in zip(("first arm", "second arm"), environment.arms, strict=True):
        spaced = name.upper().replace(" ", "  ")
        for text in (name, f" {spaced}\n", place, place.title()):
            assert environment.parse_action(text) == name
    other = next(e for e in map(started, range(1, 50)) if not set(e.arms) & set(environment.arms))
    for text in (
        "",
        "0",
        "arm",
        environment.high.split()[0],
        f"the {environment.high}",
        ", ".join(environment.arms),
        other.high,
    ):
        assert environment.parse_action(text) is None
        with pytest.raises(ValueError, match="action must be"):
            environment.step(text)
    assert not environment.done
    assert Bandit().parse_action("first arm") is None


def test_the_state_key_tells_arms_and_order_apart_and_what_has_been_paid() -> None:
    environment = started(0)
    one, two = environment.arms
    assert environment.state_key == f"{one} / {two}: 0"
    environment.step(low_of(environment))
    assert environment.state_key == f"{one} / {two}: 0.1"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"high_probability": 0}, "high_probability must be in (0, 1], got 0"),
        ({"high_probability": 1.5}, "high_probability must be in (0, 1], got 1.5"),
        ({"high_probability": float("nan")}, "high_probability must be in (0, 1], got nan"),
        ({"high_reward": float("inf")}, "high_reward must be finite, got inf"),
        ({"low_reward": 0.25}, "low_reward must be below the high arm's mean 0.25, got 0.25"),
        ({"low_reward": float("nan")}, "low_reward must be below the high arm's mean 0.25, got nan"),
        ({"low_reward": float("-inf")}, "low_reward must be below the high arm's mean 0.25, got -inf"),
        ({"high_reward": 0.2}, "low_reward must be below the high arm's mean 0.05, got 0.1"),
    ],
)
def test_settings_outside_their_limits_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Bandit(**settings)


# --------------------------------------------------------------------------------------------------------- the expert


def test_the_expert_chooses_the_high_arm() -> None:
    player, draws = BanditExpert(), np.random.default_rng(0)
    for state in range(100):
        environment = started(state)
        action = player.act(environment, draws)
        assert environment.parse_action(action) == action
        environment.step(action)
        assert environment.success


def test_random_actions_name_either_arm() -> None:
    player, draws, high = BanditExpert(), np.random.default_rng(0), 0
    for state in range(400):
        environment = started(state)
        action = player.random_action(environment, draws)
        assert action in environment.arms
        high += action == environment.high
    assert abs(high / 400 - 0.5) < spread(0.5, 400)


def test_the_experts_reasoning_never_names_an_arm_and_has_the_length_asked_for() -> None:
    player, draws, said = BanditExpert(), np.random.default_rng(0), Counter[str]()
    for state in range(200):
        environment = started(state)
        names = {*environment.arms, "first arm", "second arm"}
        for words in (0, 1, 5, 14, 40):
            reasoning = player.reason(environment, words, draws)
            assert len(reasoning.split()) == words
            assert not any(name in reasoning for name in names)
            said.update([reasoning])
    assert len(said) > 450
