"""The drawing of branches in the report: outlines of random forests, what is shown with them, and links that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.html import embedded
from pipeline.report.viewer import Played, branched_from, choose, outline, viewer_data
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.records import episode_records
from pipeline.trajectories.trajectory import Role, Trajectories
from tests.test_comparison import configuration
from tests.test_report_viewer import byte_tokenizer

properties = settings(max_examples=80)
TURN = 4
"""Tokens of a turn: one of the observation, then those of the response."""
Shape = list[tuple[int | None, int, int]]
"""Per episode the place of its parent, its split and its number of own tokens."""
FORK: Shape = [(None, 0, 12), (0, 5, 9), (1, 9, 3), (0, 5, 2), (None, 0, 6)]


def planted(shape: Shape, fresh: Iterator[int], returns: Iterable[float] = (), state: str = "s") -> Trajectories:
    """A forest of one initial state. Own tokens come from ``fresh``, so that with a counter no two of them are equal."""
    texts: list[list[int]] = []
    for parent, split, own in shape:
        shared = [] if parent is None else texts[parent][:split]
        texts.append([*shared, *(next(fresh) for _ in range(own))])
    values = dict(enumerate(returns))
    return build([episode(f"e{n}", shape[n], ids, values.get(n, 0.0), state) for n, ids in enumerate(texts)])


def episode(
    name: str, place: tuple[int | None, int, int], ids: Sequence[int], value: float, state: str
) -> EpisodeBuilder:
    link = {} if place[0] is None else {"parent": f"e{place[0]}", "split": place[1]}
    builder = EpisodeBuilder(
        episode_id=name, group_id=state, environment="toy", state_key=state, seed=0, iteration=3, policy_version=3, **link
    )  # fmt: skip
    for start in range(0, len(ids), TURN):
        written = ids[start + 1 : start + TURN]
        builder.append_text(ids[start : start + 1], Role.OBSERVATION)
        roles = [Role.REASONING, Role.ACTION, Role.OTHER][: len(written)]
        builder.append_sampled(written, roles, [-0.5] * len(written), [0.1] * len(written))
        builder.close_turn(start + 1, value if start == 0 else 0.0, "Up", True, state)
    builder.finish(value > 0, "goal")
    return builder


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    shape: Shape = []
    for row in range(draw(st.integers(1, 12))):
        parent = draw(st.none() | st.integers(0, row - 1)) if row else None
        if parent is None:
            shape.append((None, 0, draw(st.integers(1, 14))))
        else:
            before, length = shape[parent][1], shape[parent][1] + shape[parent][2]
            shape.append((parent, draw(st.integers(before + 1, length)), draw(st.integers(1, 9))))
    return shape


@st.composite
def forests(draw: st.DrawFn) -> Trajectories:
    """In any order: a branch may stand before its parent."""
    table = planted(draw(shapes()), count(), draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=12)))
    return table.select(draw(st.permutations(range(len(table)))))


def ids_of(table: Trajectories, row: int) -> list[int]:
    return list(table.input_ids[table.offsets[row] : table.offsets[row + 1]].tolist())


@properties
@given(forests())
def test_an_outline_draws_every_token_once_and_its_lines_spell_out_the_episodes(table: Trajectories) -> None:
    order, drawn = outline(table, range(len(table)))
    assert sorted(order) == list(range(len(table)))
    assert drawn["strays"] == 0
    assert drawn["id"] == [table.episodes["episode_id"][row] for row in order]
    starts = [split or 0 for split in drawn["split"]]
    prefixes = {tuple(ids_of(table, row)[: end + 1]) for row in order for end in range(table.lengths[row])}
    assert sum(np.array(drawn["length"]) - starts) == len(prefixes)
    for place, row in enumerate(order):
        spelled, end, line = list[int](), drawn["length"][place], place
        while line is not None:
            spelled = ids_of(table, order[line])[starts[line] : end] + spelled
            end, line = starts[line], drawn["parent"][line]
        assert spelled == ids_of(table, row)
        assert drawn["ends"][place] == [*range(TURN, len(spelled), TURN), len(spelled)]
        if (parent := drawn["parent"][place]) is not None:
            roles = table.role[table.offsets[order[parent]] :][starts[place] : drawn["length"][parent]]
            assert drawn["role"][place] == (Role(roles[0]).name.lower() if len(roles) else None)


@properties
@given(forests())
def test_no_line_of_an_outline_crosses_another_or_a_return(table: Trajectories) -> None:
    _, drawn = outline(table, range(len(table)))
    for place, (parent, split) in enumerate(zip(drawn["parent"], drawn["split"], strict=True)):
        if parent is not None:
            assert parent < place
            # the rows between begin at the split at the earliest; a return stands to the right of its row
            assert all((drawn["split"][row] or 0) >= split for row in range(parent + 1, place))


@properties
@given(forests(), st.integers(1, 5))
def test_what_an_episode_branched_from_is_shown_with_it(table: Trajectories, episodes: int) -> None:
    bare = replace(table, episodes={**table.episodes, "parent": [None] * len(table), "split": [None] * len(table)})
    expected = set(choose({"m": Played(bare, {})}, 1, episodes)["m"])
    names = table.episodes["episode_id"]
    for _ in names:  # as many rounds as a line of descent can be long
        expected |= {names.index(table.episodes["parent"][row]) for row in expected if table.episodes["parent"][row]}
    shown = choose({"m": Played(table, {})}, 1, episodes)["m"]
    assert len(shown) == len(set(shown))
    assert set(shown) == expected
    assert sorted(table.returns[shown], reverse=True) == list(table.returns[shown])


@properties
@given(forests(), st.data())
def test_any_links_at_all_give_an_outline_of_every_episode(table: Trajectories, data: st.DataObject) -> None:
    names, n = table.episodes["episode_id"], len(table)
    parents = data.draw(st.lists(st.none() | st.sampled_from([*names, "gone"]), min_size=n, max_size=n))
    splits = data.draw(st.lists(st.none() | st.integers(-2, 20), min_size=n, max_size=n))
    table = replace(table, episodes={**table.episodes, "parent": parents, "split": splits})
    order, drawn = outline(table, range(n))
    assert sorted(order) == list(range(n))
    roots = sum(parent is None for parent in parents)
    assert roots + drawn["strays"] == drawn["parent"].count(None)
    for place, parent in enumerate(drawn["parent"]):
        if parent is not None:
            one, other = (ids_of(table, order[at])[: drawn["split"][place]] for at in (place, parent))
            assert parent < place
            assert one == other
            assert len(one) == drawn["split"][place] > 0


@pytest.mark.parametrize(
    ("row", "parent", "split"),
    [
        (1, "gone", 5),
        (1, "e1", 5),  # itself
        (1, "e0", None),
        (1, "e0", 0),
        (1, "e0", -3),
        (1, "e0", 13),  # longer than the parent
        (1, "e0", 6),  # another token there
        (1, "e2", 5),  # a circle
        (2, "e1", 5),  # not later than the parent's own
    ],
)
def test_a_link_that_does_not_fit_makes_a_root_and_is_counted(row: int, parent: str, split: int | None) -> None:
    table = planted(FORK, count())
    assert branched_from(table, range(5)) == {1: 0, 2: 1, 3: 0}
    table.episodes["parent"][row], table.episodes["split"][row] = parent, split
    assert row not in branched_from(table, range(5))
    _, drawn = outline(table, range(5))
    assert drawn["strays"] >= 1
    assert drawn["parent"][drawn["id"].index(f"e{row}")] is None


def test_a_method_with_branches_has_an_outline_per_state_and_others_have_none() -> None:
    config = configuration(report={"states": 2, "episodes": 2})
    tree = planted(FORK, byte_ids(), [0, 0.5, 1, 0.25, 0], "SFFF/FHFF/FFFG/FFFF@0,0")
    flat = replace(tree, episodes={**tree.episodes, "parent": [None] * 5, "split": [None] * 5})
    played = {("lake", "grpo"): Played(tree, {}), ("lake", "grpo_actfocus"): Played(flat, {})}
    found = viewer_data(config, byte_tokenizer(), played)["lake"]
    assert [record["id"] for record in found["grpo"]] == ["e2", "e1", "e0", "e4"]
    assert [(record["parent"], record["split"]) for record in found["grpo"][:3]] == [("e1", 9), ("e0", 5), (None, None)]
    forest = found["grpo"][0]["forest"]
    assert forest["id"] == ["e0", "e1", "e2", "e3", "e4"]
    assert forest["episode"] == [2, 1, 0, None, 3]
    assert not any("forest" in record for record in [*found["grpo"][1:], *found["grpo_actfocus"]])


def test_outlines_of_many_methods_are_small() -> None:
    shape: Shape = [(None, 0, 300), *[(0, 20 * row, 300 - 20 * row) for row in range(1, 16)]]
    table = planted(shape, count(), [row / 10 for row in range(16)])
    table.episodes["episode_id"] = [f"frozen_lake-train-0-35-{row}-{row}" for row in range(16)]
    table.episodes["parent"] = [name and "frozen_lake-train-0-35-0-0" for name in table.episodes["parent"]]
    _, drawn = outline(table, range(16))
    drawn["ends"] = [ends[:8] for ends in drawn["ends"]]  # the turns of an episode are few
    assert drawn["strays"] == 0
    assert 12 * 2 * 2 * len(embedded(drawn)) < 100_000
    assert json.loads(str(embedded(drawn))) == drawn


def test_a_record_names_its_parent() -> None:
    records: list[dict[str, Any]] = episode_records(planted(FORK, byte_ids()), byte_tokenizer())
    assert [(r["parent"], r["split"]) for r in records] == [(None, None), ("e0", 5), ("e1", 9), ("e0", 5), (None, None)]


def byte_ids() -> Iterator[int]:
    """Token ids of the byte tokenizer, over and over."""
    return (number % 256 for number in count())
