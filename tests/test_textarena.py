"""Games of TextArena."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.environment import check_environment
from pipeline.environments import make
from pipeline.workspace.errors import UserError
from tests.extras import ARENA, installed, section, started


@installed("textarena")
@pytest.mark.parametrize("game", ["GuessTheNumber-v0", "2048-v0-ultra-easy", "FrozenLake-v0-random", "Blackjack-v0"])
def test_a_game_keeps_every_contract(game: str) -> None:
    assert check_environment(section(ARENA, game=game)) == []


@installed("textarena")
def test_a_guess_is_answered_and_the_right_one_wins() -> None:
    environment = started(ARENA, 4)
    secret = environment.game.state.game_state["game_number"]
    assert 1 <= secret <= 20
    asked = 1 if secret > 1 else 2
    hint = "higher" if secret > asked else "lower"
    assert environment.step(f"[{asked}]") == (f"The target number is {hint}.", 0.0, False, False, {})
    assert (environment.success, environment.actions_left, environment.done) == (False, 99, False)
    assert environment.step(f"I say [{secret}]")[1:4] == (1.0, True, False)
    assert (environment.success, environment.actions_left, environment.done) == (True, 98, True)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step("[3]")


@installed("textarena")
def test_an_observation_holds_what_is_new_and_not_the_players_own_words() -> None:
    environment = started(ARENA, 1, game="2048-v0-ultra-easy")
    assert "Valid moves" in environment.opening
    observation = environment.step("up, says the player")[0]
    assert "Valid moves" not in observation
    assert "says the player" not in observation


@installed("textarena")
def test_the_game_itself_counts_invalid_moves() -> None:
    environment = started(ARENA)
    observation, reward, terminated, truncated, _ = environment.step("well")
    assert observation.startswith("You attempted an invalid move.")
    assert (reward, terminated, truncated) == (0.0, False, False)
    observation, reward, terminated, truncated, _ = environment.step("well")
    assert observation.startswith("Invalid Move: ")
    assert (reward, terminated, truncated, environment.success) == (0.0, True, False, False)


@installed("textarena")
def test_an_unfinished_game_is_cut_off_after_max_actions() -> None:
    environment = started(ARENA, max_actions=2, config={"max_number": 1000})
    assert "between 1 and 1000" in environment.opening
    assert "You have 2 actions." in environment.instructions
    assert environment.step("[1]")[1:4] == (0.0, False, False)
    assert environment.step("[2]")[1:4] == (0.0, False, True)
    assert (environment.success, environment.actions_left, environment.done) == (False, 0, True)


@installed("textarena")
def test_the_number_of_a_game_says_nothing_about_what_it_hides() -> None:
    numbers, secrets, twins = [], [], set()
    environment: Any = make(section(ARENA, config={"max_number": 4}))
    for state in range(400):
        environment.reset(seed=0, options={"state_seed": state})
        found = re.match(r"Game (\d+)\.\nYou are Player 0", environment.opening)
        assert found is not None
        numbers.append(int(found[1]))
        secrets.append(environment.game.state.game_state["game_number"])
        twins.add(environment.state_key)
    assert len(set(numbers)) == len(twins) == 400
    assert abs(np.corrcoef(numbers, secrets)[0, 1]) < 4 / 400**0.5
    assert "Game " not in started(ARENA, game="FrozenLake-v0-random").opening


@installed("textarena")
def test_a_groups_members_share_the_start_but_not_what_follows() -> None:
    openings, boards = set(), set()
    for seed in range(8):
        environment = started(ARENA, 2, seed, game="2048-v0-ultra-easy")
        openings.add((environment.opening, environment.state_key))
        for move in ("up", "left", "down"):
            environment.step(move)
        boards.add(environment.state_key)
    assert len(openings) == 1
    assert len(boards) > 4


@installed("textarena")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_actions": 0}, "max_actions must be a whole number from 1 on, got 0"),
        ({"game": "GuessNumber-v0"}, "game must be one of TextArena's, got 'GuessNumber-v0'; did you mean 'Guess"),
        ({"game": "Nim-v0"}, "game 'Nim-v0' cannot be played alone: AssertionError: The number of players has to be 2"),
        ({"game": "MarketEntryGame-v0"}, "game 'MarketEntryGame-v0' is for several players"),
        ({"game": "TowerOfHanoi-v0"}, "game 'TowerOfHanoi-v0' always starts in the same state: there is nothing to"),
        ({"game": "Countdown-v0"}, "game 'Countdown-v0' cannot be played alone: TypeError: "),
        ({"config": {"numbers": 3}}, "game 'GuessTheNumber-v0' cannot be played alone: TypeError: "),
    ],
)
def test_what_cannot_be_played_is_said_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(section(ARENA, **settings))
    assert str(caught.value).startswith(f"environments: {ARENA!r} refuses its settings: {said}")
    assert "\n" not in str(caught.value)
