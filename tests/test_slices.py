"""Slices of a table: kept as they are finished, and not made again by who goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.energy.annotate import annotate_part
from pipeline.rollout.slices import SlicesTask, sample_slices
from pipeline.trajectories.learnable import why_nothing_to_learn
from pipeline.trajectories.table import read, write
from pipeline.trajectories.trajectory import Trajectories, concatenate
from tests.trainings import LAKE, configured, quiet


def sampled(directory: Path, cache: Path) -> Trajectories:
    found = sample_slices(SlicesTask(configured(), LAKE, directory, [0, 1, 2], cache), quiet)
    return concatenate([found[seed] for seed in range(3)])


def annotated(directory: Path, table: Trajectories, cache: Path) -> Trajectories:
    return annotate_part((configured(), directory, table, cache), quiet)


def bytes_of(table: Trajectories, file: Path) -> bytes:
    write(table, file)
    return file.read_bytes()


def test_who_goes_on_makes_only_the_slices_that_are_missing_and_the_same_table(directory: Path, tmp_path: Path) -> None:
    rolled, scored = tmp_path / "rolled", tmp_path / "scored"
    table = sampled(directory, rolled)
    whole = annotated(directory, table, scored)
    before = [bytes_of(part, tmp_path / "table.parquet") for part in (table, whole)]
    for folder in (rolled, scored):
        assert sorted(file.name for file in folder.iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]
        (folder / "1.parquet").unlink()
        times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
        again = sampled(directory, rolled) if folder is rolled else annotated(directory, table, scored)
        assert bytes_of(again, tmp_path / "table.parquet") == before[folder is scored]
        assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_slice_that_is_kept_is_what_the_table_has(directory: Path, tmp_path: Path) -> None:
    sampled(directory, tmp_path)
    other = read(tmp_path / "2.parquet")
    write(other, tmp_path / "0.parquet")
    table = sampled(directory, tmp_path)
    assert np.array_equal(table.select(range(len(other))).input_ids, other.input_ids)


@pytest.fixture(scope="module")
def episodes(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return sampled(directory, tmp_path_factory.mktemp("slices"))


def changed(episodes: Trajectories, valid: list[bool], returns: list[float]) -> Trajectories:
    """Episodes with other turns and returns, over and over."""
    count, turns = len(episodes), len(episodes.turns["valid"])
    episodes.turns["valid"][:] = [valid[i % len(valid)] for i in range(turns)]
    episodes.turns["well_formed"][:] = episodes.turns["valid"]
    episodes.episodes["return"][:] = [returns[i % len(returns)] for i in range(count)]
    return episodes


def test_nothing_to_learn_is_said_in_words(episodes: Trajectories) -> None:
    turns = len(episodes.turns["valid"])
    few = changed(episodes, [True] + [False] * turns, [0.0, 1.0])
    assert why_nothing_to_learn(few) == f"1 of {turns} turns are valid"
    equal = changed(episodes, [True], [0.3])
    assert why_nothing_to_learn(equal) == f"of {int(episodes.groups.max()) + 1} groups none has returns that vary"
    assert why_nothing_to_learn(changed(episodes, [True], [0.0, 0.0, 0.0, 1.0])) == ""
