"""Sokoban's rules by hand-worked episodes, its rooms and its prompt."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.environments.sokoban import MOVES, Sokoban
from pipeline.workspace.errors import UserError
from tests.rooms import Cells, arranged, bordered, drawn, key_rows, parsed, shortest

# --------------------------------------------------------------------------------------------------------------- rules

EPISODES: dict[str, tuple[str, dict[str, Any], list[tuple[str, float, str]], str]] = {
    "one push solves": ("PXO/___/___", {}, [("Right", 10.9, "_P√/___/___")], "solved"),
    "walking round to push up": (
        "_O_/PX_/___",
        {},
        [("Down", -0.1, "_O_/_X_/P__"), ("Right", -0.1, "_O_/_X_/_P_"), ("Up", 10.9, "_√_/_P_/___")],
        "solved",
    ),
    "walls stop the player and cost a step": (
        "P#_/_XO/___",
        {},
        [
            ("Up", -0.1, "P#_/_XO/___"),
            ("Left", -0.1, "P#_/_XO/___"),
            ("Right", -0.1, "P#_/_XO/___"),
            ("Down", -0.1, "_#_/PXO/___"),
            ("Right", 10.9, "_#_/_P√/___"),
        ],
        "solved",
    ),
    "walls stop a box: border, then inside": (
        "PX_/_#_/__O",
        {},
        [
            ("Right", -0.1, "_PX/_#_/__O"),
            ("Right", -0.1, "_PX/_#_/__O"),
            ("Down", -0.1, "_PX/_#_/__O"),
            ("Left", -0.1, "P_X/_#_/__O"),
        ],
        "",
    ),
    "a wall inside stops a box": ("PX#/__O/___", {}, [("Right", -0.1, "PX#/__O/___")], ""),
    "a box stops a box": (
        "PXX_/____/____/OO__",
        {},
        [("Right", -0.1, "PXX_/____/____/OO__"), ("Down", -0.1, "_XX_/P___/____/OO__")],
        "",
    ),
    "boxes are not pulled": ("_XP/___/O__", {}, [("Right", -0.1, "_XP/___/O__"), ("Down", -0.1, "_X_/__P/O__")], ""),
    "off a target, and both back on": (
        "P√__/____/_X__/_O__",
        {},
        [
            ("Right", -1.1, "_SX_/____/_X__/_O__"),
            ("Down", -0.1, "_OX_/_P__/_X__/_O__"),
            ("Down", 0.9, "_OX_/____/_P__/_√__"),
            ("Right", -0.1, "_OX_/____/__P_/_√__"),
            ("Right", -0.1, "_OX_/____/___P/_√__"),
            ("Up", -0.1, "_OX_/___P/____/_√__"),
            ("Up", -0.1, "_OXP/____/____/_√__"),
            ("Left", 10.9, "_√P_/____/____/_√__"),
        ],
        "solved",
    ),
    "from target to target pays nothing": (
        "P√O_/____/_X__/____",
        {},
        [("Right", -0.1, "_S√_/____/_X__/____"), ("Right", -1.1, "_OSX/____/_X__/____")],
        "",
    ),
    "walking over a target": (
        "PO_/_X_/___",
        {},
        [("Right", -0.1, "_S_/_X_/___"), ("Right", -0.1, "_OP/_X_/___"), ("Left", -0.1, "_S_/_X_/___")],
        "",
    ),
    "cut off": (
        "P__/_XO/___",
        {"max_actions": 3},
        [("Right", -0.1, "_P_/_XO/___"), ("Left", -0.1, "P__/_XO/___"), ("Left", -0.1, "P__/_XO/___")],
        "cut off",
    ),
    "solved with the last action": (
        "P__/_XO/___",
        {"max_actions": 2},
        [("Down", -0.1, "___/PXO/___"), ("Right", 10.9, "___/_P√/___")],
        "solved",
    ),
    "rewards of one's own": (
        "P√__/____/_X__/_O__",
        {"step_reward": -0.5, "on_target": 2.0, "off_target": -3, "solved": 7},
        [
            ("Left", -0.5, "P√__/____/_X__/_O__"),
            ("Right", -3.5, "_SX_/____/_X__/_O__"),
            ("Down", -0.5, "_OX_/_P__/_X__/_O__"),
            ("Down", 1.5, "_OX_/____/_P__/_√__"),
            ("Right", -0.5, "_OX_/____/__P_/_√__"),
            ("Right", -0.5, "_OX_/____/___P/_√__"),
            ("Up", -0.5, "_OX_/___P/____/_√__"),
            ("Up", -0.5, "_OXP/____/____/_√__"),
            ("Left", 8.5, "_√P_/____/____/_√__"),
        ],
        "solved",
    ),
}
"""Room inside its border, settings, moves with reward and the room they lead to, and how the episode ends if it does."""


@pytest.mark.parametrize(("inside", "settings", "moves", "end"), EPISODES.values(), ids=EPISODES.keys())
def test_hand_worked_episodes(
    inside: str, settings: dict[str, Any], moves: list[tuple[str, float, str]], end: str
) -> None:
    environment = arranged(inside, **settings)
    for number, (action, expected, rows) in enumerate(moves, start=1):
        last = number == len(moves)
        observation, reward, terminated, truncated, _ = environment.step(action)
        assert isinstance(reward, float)
        assert reward == pytest.approx(expected, abs=1e-12)
        assert drawn(observation) == bordered(rows) == key_rows(environment)
        assert environment.actions_left == environment.max_actions - number
        assert (terminated, truncated) == (last and end == "solved", last and end == "cut off")
        assert environment.success == terminated
        assert environment.done == (terminated or truncated)
    if end:
        with pytest.raises(RuntimeError, match="call reset"):
            environment.step("Up")


@pytest.mark.parametrize("rewards", [(-0.1, 1.0, -1.0), (0.0, 2.0, -2.0), (0.0, 2.0, -2.5), (-0.5, -1.0, 1.0)])
def test_pushing_off_and_on_again_never_pays(rewards: tuple[float, float, float]) -> None:
    step, on, off = rewards
    environment = arranged("____/P√__/____/O__X", max_actions=200, step_reward=step, on_target=on, off_target=off)
    start = environment.state_key
    pushed = ["Right", "Up", "Right", "Right", "Down", "Left", "Up", "Left", "Left", "Down"]
    for _ in range(5):
        earned = [environment.step(action)[1] for action in pushed]
        assert environment.state_key == start
        assert earned == pytest.approx([step + off, *[step] * 4, step + on, *[step] * 4])
        assert sum(earned) <= 1e-9


@pytest.mark.parametrize("text", ["Up", " up ", "DOWN\n", "left", "\tRight"])
def test_actions_are_parsed_in_any_case(text: str) -> None:
    assert Sokoban().parse_action(text) == text.strip().title()


@pytest.mark.parametrize("text", ["", "U", "up up", "up||down", "north", "Push Up", "0"])
def test_anything_else_is_no_action(text: str) -> None:
    assert Sokoban().parse_action(text) is None


# --------------------------------------------------------------------------------------------------------------- rooms


@pytest.mark.parametrize(
    ("settings", "rooms"),
    [
        ({}, 100),
        ({"least_moves": 8}, 30),
        ({"least_moves": 3, "max_actions": 3}, 30),
        ({"size": 5, "boxes": 2, "inner_walls": 0.0, "max_actions": 30}, 30),
        ({"size": 7, "inner_walls": 0.5, "max_actions": 15}, 60),
        ({"size": 10, "inner_walls": 0.3, "least_moves": 5, "max_actions": 12}, 10),
    ],
)
def test_rooms_are_as_the_settings_say(settings: dict[str, Any], rooms: int) -> None:
    environment, lengths = Sokoban(**settings), []
    for seed in range(rooms):
        grid = drawn(environment.reset(seed=seed)[0])
        cells, size = parsed(grid), environment.size
        assert [len(row) for row in grid] == [size] * size
        border = {(r, c) for r in range(size) for c in range(size) if {r, c} & {0, size - 1}}
        assert border <= cells["walls"]
        assert len(cells["boxes"]) == len(cells["targets"]) == environment.count
        assert cells["boxes"].isdisjoint(cells["targets"])
        assert len(cells["player"]) == 1
        assert connected({(r, c) for r in range(size) for c in range(size)} - cells["walls"])
        moves = shortest(grid)
        assert moves is not None
        lengths.append(moves)
    assert environment.least_moves <= min(lengths)
    assert max(lengths) <= environment.max_actions


def connected(cells: Cells) -> bool:
    reached, edge = set(), {min(cells)}
    while edge:
        reached |= edge
        edge = {(r + dr, c + dc) for r, c in edge for dr, dc in MOVES.values()} & cells - reached
    return reached == cells


def test_rooms_vary_in_everything() -> None:
    environment, keys, lengths = Sokoban(), set(), Counter[int | None]()
    places: dict[str, Cells] = {"walls": set(), "targets": set(), "boxes": set(), "player": set()}
    for seed in range(200):
        environment.reset(seed=seed)
        keys.add(environment.state_key)
        lengths[shortest(key_rows(environment))] += 1
        for name, cells in parsed(key_rows(environment)).items():
            places[name] |= {(r, c) for r, c in cells if {r, c}.isdisjoint({0, 5})}
    assert len(keys) > 190
    assert all(len(cells) == 16 for name, cells in places.items() if name != "boxes")
    assert len(places["boxes"]) > 8
    assert min(lengths[n] for n in range(1, 9)) > 0


def test_inner_walls_are_as_frequent_as_asked() -> None:
    shares = {}
    for chance in (0.0, 0.1, 0.3):
        environment = Sokoban(size=8, inner_walls=chance, max_actions=20)
        walls = 0
        for seed in range(100):
            environment.reset(seed=seed)
            walls += len(environment.room.walls) - 28
        shares[chance] = walls / 3600
    assert shares[0.0] == 0
    assert 0.08 < shares[0.1] < 0.13
    assert 0.27 < shares[0.3] < 0.45


def test_the_state_key_is_the_whole_state_and_nothing_else() -> None:
    environment = arranged("P_O/_X_/___")
    keys = [environment.state_key]
    for action in ("Up", "Right", "Left"):
        environment.step(action)
        keys.append(environment.state_key)
    assert keys == ["#####/#P_O#/#_X_#/#___#/#####"] * 2 + ["#####/#_PO#/#_X_#/#___#/#####", keys[0]]
    others = ("_PO/_X_/___", "P_O/_X_/#__", "PO_/_X_/___", "P_O/X__/___", "P_O/_√_/X__")
    assert len({arranged(inside).state_key for inside in others} | {keys[0]}) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 5, "boxes": 3, "max_actions": 1},
        {"least_moves": 40, "max_actions": 50},
    ],
)
def test_rooms_that_do_not_exist_are_searched_for_a_bounded_time(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^environments: no room found with size \d, boxes \d, inner_walls 0\.1, "):
        Sokoban(**settings).reset(seed=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 4}, "size must be a whole number from 5 to 10, got 4"),
        ({"size": 11}, "size must be a whole number from 5 to 10, got 11"),
        ({"size": 6.0}, "size must be a whole number from 5 to 10, got 6.0"),
        ({"size": "big"}, "size must be a whole number from 5 to 10, got 'big'"),
        ({"boxes": 0}, "boxes must be a whole number from 1 to 3, got 0"),
        ({"boxes": 4}, "boxes must be a whole number from 1 to 3, got 4"),
        ({"max_actions": 0}, "max_actions must be a whole number from 1 to 200, got 0"),
        ({"max_actions": 201}, "max_actions must be a whole number from 1 to 200, got 201"),
        ({"least_moves": 0}, "least_moves must be a whole number from 1 to 10, got 0"),
        ({"least_moves": 6, "max_actions": 5}, "least_moves must be a whole number from 1 to 5, got 6"),
        ({"inner_walls": -0.1}, "inner_walls must be 0 to 0.5, got -0.1"),
        ({"inner_walls": 0.6}, "inner_walls must be 0 to 0.5, got 0.6"),
        ({"grid": "sometimes"}, "grid must be always, first or never, got 'sometimes'"),
        ({"coordinates": "no"}, "coordinates must be true or false, got 'no'"),
        ({"grid": "never", "coordinates": False}, "coordinates must be true if grid is never, got False"),
        ({"step_reward": 0.1}, "step_reward must be finite and at most 0, got 0.1"),
        ({"step_reward": float("-inf")}, "step_reward must be finite and at most 0, got -inf"),
        ({"on_target": float("nan")}, "on_target must be finite and at most inf, got nan"),
        ({"off_target": -0.5}, "off_target must be finite and at most -1, got -0.5"),
        ({"on_target": 2.0}, "off_target must be finite and at most -2, got -1.0"),
        ({"solved": float("inf")}, "solved must be finite and at most inf, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Sokoban(**settings)


# -------------------------------------------------------------------------------------------------------------- prompt


@pytest.mark.parametrize(("size", "boxes", "most"), [(6, 1, 10), (8, 3, 35)])
def test_every_number_of_the_prompt_matches_the_instance(size: int, boxes: int, most: int) -> None:
    environment, draws = Sokoban(size=size, boxes=boxes, max_actions=most), np.random.default_rng(0)
    text = environment.instructions
    noun = "box and 1 target" if boxes == 1 else f"boxes and {boxes} targets"
    assert f"room of {size}x{size} cells with {boxes} {noun}." in text
    assert f"from (0, 0), top left, to ({size - 1}, {size - 1}), bottom right" in text
    assert f"Actions: Up, Down, Left, Right. You have {most} actions." in text
    assert set(map(int, re.findall(r"\d+", text))) == {size, boxes, 0, size - 1, most}
    for seed in range(20):
        observation, _ = environment.reset(seed=seed)
        assert environment.instructions == text
        assert_shows(environment, observation)
        while not environment.done:
            observation, *_ = environment.step(list(MOVES)[int(draws.integers(4))])
            assert_shows(environment, observation)


def assert_shows(environment: Sokoban, observation: str) -> None:
    """Grid and coordinates describe the room as it is, and use the symbols of the instructions alone."""
    *rows, coordinates = observation.split("\n")
    legend = re.findall(r"[:,] (\S) ", environment.instructions)
    assert len(legend) == 7
    assert {symbol for row in rows for symbol in row.split(" ")} <= set(legend)
    cells = parsed([row.replace(" ", "") for row in rows])
    last = environment.size - 1
    cells["walls"] = {(r, c) for r, c in cells["walls"] if {r, c}.isdisjoint({0, last})}
    match = re.fullmatch(r"player (.*) boxes (.*) targets (.*) walls (.*)", coordinates)
    assert match is not None
    for name, listed in zip(("player", "boxes", "targets", "walls"), match.groups(), strict=True):
        numbers = [] if listed == "none" else list(map(int, listed.split(" ")))
        assert list(zip(numbers[::2], numbers[1::2], strict=True)) == sorted(cells[name])
    size = environment.size
    own = {"player": {environment.player}, "boxes": environment.boxes, "targets": environment.room.targets}
    assert own == {name: {r * size + c for r, c in cells[name]} for name in own}


@pytest.mark.parametrize(
    ("grid", "coordinates", "shown"),
    [
        ("always", True, [True, True]),
        ("always", False, [True, True]),
        ("first", True, [True, False]),
        ("first", False, [True, False]),
        ("never", True, [False, False]),
    ],
)
def test_grid_and_coordinates_are_given_when_asked_for(grid: str, coordinates: bool, shown: list[bool]) -> None:
    environment = Sokoban(grid=grid, coordinates=coordinates, least_moves=2)
    first, _ = environment.reset(seed=0)
    second, *_ = environment.step("Left")
    assert [len(drawn(text)) == 6 for text in (first, second)] == shown
    assert ["player" in text for text in (first, second)] == [coordinates] * 2
    assert ("Symbols" in environment.instructions) == (grid != "never")
    assert ("Coordinates" in environment.instructions) == coordinates
    assert "Actions" in environment.instructions


def test_the_longest_observation_fits_its_space() -> None:
    environment = Sokoban(size=10, boxes=3, inner_walls=0.4, max_actions=200)
    lengths = [len(environment.reset(seed=seed)[0]) for seed in range(5)]
    assert 400 < max(lengths) <= environment.observation_space.max_length
