"""Sokoban's expert, against a search that shares no code with it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.environments import sokoban
from pipeline.environments.sokoban import MOVES, NODES, OPENING_NODES, Sokoban, SokobanExpert, solve
from tests.rooms import arranged, bordered, finish, key_rows, shortest, wander


def test_the_expert_solves_every_small_room_in_the_fewest_moves() -> None:
    environment, expert, draws = Sokoban(), SokobanExpert(), np.random.default_rng(0)
    for seed in range(1000):
        environment.reset(seed=seed)
        fewest = shortest(key_rows(environment))
        assert finish(environment, expert, draws) == fewest
        assert environment.success


def test_after_deviations_the_expert_is_still_the_fastest() -> None:
    environment, expert, draws = Sokoban(max_actions=60), SokobanExpert(), np.random.default_rng(0)
    outcomes = Counter[bool]()
    for seed in range(60):
        environment.reset(seed=seed)
        for _ in range(3):
            if not environment.done:
                environment.step(expert.act(environment, draws))
                wander(environment, int(draws.integers(1, 4)), draws)
        if not environment.done:
            fewest = shortest(key_rows(environment))
            left = environment.actions_left
            moves = finish(environment, expert, draws)
            assert (environment.success, moves) == ((False, left) if fewest is None else (True, fewest))
            outcomes[environment.success] += 1
    assert min(outcomes[True], outcomes[False]) > 2


LARGER = [(size, boxes) for boxes in (1, 2, 3) for size in range(6, 11) if (size, boxes) != (6, 1)]


@pytest.mark.parametrize(("size", "boxes"), LARGER)
def test_the_expert_solves_larger_rooms_within_its_budget(size: int, boxes: int) -> None:
    """50 of each kind, with up to 20 moves for each box."""
    environment = Sokoban(size=size, boxes=boxes, max_actions=20 * boxes)
    expert, draws = SokobanExpert(), np.random.default_rng(0)
    for seed in range(50):
        environment.reset(seed=seed)
        plan = solve(environment.room, (environment.player, environment.boxes), OPENING_NODES)
        assert plan is not None
        assert finish(environment, expert, draws) == len(plan)
        assert environment.success


@pytest.mark.parametrize(("size", "boxes", "most", "rooms"), [(10, 1, 60, 10), (7, 2, 40, 10), (6, 3, 14, 4)])
def test_solutions_of_larger_rooms_are_the_shortest(size: int, boxes: int, most: int, rooms: int) -> None:
    environment = Sokoban(size=size, boxes=boxes, max_actions=most)
    for seed in range(rooms):
        environment.reset(seed=seed)
        plan = solve(environment.room, (environment.player, environment.boxes))
        assert plan is not None
        assert len(plan) == shortest(key_rows(environment))


def test_the_search_stops_at_its_limits() -> None:
    environment = arranged("P___/_X__/____/___O")
    state, fewest = (environment.player, environment.boxes), shortest(bordered("P___/_X__/____/___O"))
    assert fewest == 7
    plan = solve(environment.room, state)
    assert plan is not None
    assert [len(plan), next(iter(plan))] == [7, state]
    assert solve(environment.room, state, nodes=6) is None
    assert solve(environment.room, state, limit=6) is None
    assert solve(environment.room, state, limit=7) == plan
    assert solve(environment.room, (state[0], environment.room.targets)) == {}
    assert OPENING_NODES < NODES


def test_cells_from_which_a_box_is_lost_are_left_out_of_the_search() -> None:
    """Towards a target in the top left corner of 3x3 cells: nothing leads away from the right and lower sides."""
    assert sokoban._pushes(arranged("O__/_X_/__P").room, 6) == {6: 0, 7: 1, 11: 1, 12: 2}


@pytest.mark.parametrize("inside", ["X__/_P_/__O", "P___/_XX_/_##_/O__O", "P_O/___/XXO"])
def test_where_nothing_helps_the_expert_makes_any_move(inside: str) -> None:
    environment, draws = arranged(inside), np.random.default_rng(0)
    assert shortest(key_rows(environment)) is None
    assert set(MOVES) == {SokobanExpert().act(environment, draws) for _ in range(100)}


def test_a_plan_is_searched_for_once_and_again_after_a_deviation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def counted(*arguments: Any) -> Any:
        searches.append(arguments)
        return solve(*arguments)

    environment, expert, draws = arranged("P___/_X__/____/___O"), SokobanExpert(), np.random.default_rng(0)
    monkeypatch.setattr(sokoban, "solve", counted)
    planned = solve(environment.room, (environment.player, environment.boxes))
    assert planned is not None
    for _ in range(3):
        environment.step(expert.act(environment, draws))
    assert len(searches) == 1
    environment.step("Left")
    assert (environment.player, environment.boxes) not in planned
    fewest = shortest(key_rows(environment))
    assert finish(environment, expert, draws) == fewest
    assert len(searches) == 2


def test_a_plan_is_not_followed_in_a_room_with_other_walls() -> None:
    expert, draws = SokobanExpert(), np.random.default_rng(0)
    open_room, walled = arranged("P___/_X__/____/___O"), arranged("P___/#X__/____/___O")
    assert (walled.player, walled.boxes) == (open_room.player, open_room.boxes)
    assert [expert.act(environment, draws) for environment in (open_room, walled, open_room)] == [
        "Down",
        "Right",
        "Down",
    ]


def test_random_actions_are_all_moves() -> None:
    environment, draws = arranged("PXO/___/___"), np.random.default_rng(0)
    made = Counter(SokobanExpert().random_action(environment, draws) for _ in range(400))
    assert set(made) == set(MOVES)
    assert min(made.values()) > 60


def test_the_experts_reasoning_never_names_a_move_and_has_the_length_asked_for() -> None:
    expert, draws = SokobanExpert(), np.random.default_rng(0)
    said: Counter[str] = Counter()
    for boxes in (1, 2):
        environment = Sokoban(boxes=boxes, max_actions=30)
        for seed in range(150):
            environment.reset(seed=seed)
            wander(environment, seed % 5, draws)
            for words in (0, 1, 5, 14, 40):
                reasoning = expert.reason(environment, words, draws)
                assert len(reasoning.split()) == words
                assert not re.search(r"\b(left|right|up|down)(wards?)?\b", reasoning, re.IGNORECASE)
                said.update([reasoning])
    assert len(said) > 800


def test_the_experts_reasoning_is_true() -> None:
    environment, expert, draws = arranged("P√__/____/_X__/_O__"), SokobanExpert(), np.random.default_rng(0)
    facts = {" ".join(fact.split()) for _ in range(60) for fact in expert._facts(environment, draws)}
    positions = {re.sub(r"\D*", "", fact) for fact in facts if re.search(r"player|I am", fact)}
    assert positions == {"11"}
    assert {fact for fact in facts if fact.startswith("a box")} == {"a box at 3 2"}
    assert {fact for fact in facts if fact.startswith("the target")} == {"the target is at 4 2"}
    assert {fact for fact in facts if "distance" in fact} == {"row distance 1", "column distance 0"}
    assert {fact for fact in facts if fact.startswith("boxes home")} == {"boxes home 1"}
