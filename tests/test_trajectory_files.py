"""Trajectories in files: equal bytes, interrupted writes, files of another kind."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from pipeline.trajectories.builder import build
from pipeline.trajectories.parquet import write_parquet
from pipeline.trajectories.table import SCHEMA_VERSION, read, to_table, write
from pipeline.trajectories.trajectory import Trajectories, TrajectoryError
from tests.trajectory_cases import assert_equal, one_episode, properties, tables

# --------------------------------------------------------------------------------------------------- in and out


@properties
@given(tables())
def test_parquet_gives_back_what_was_written_in_equal_bytes(made: Trajectories) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "t.parquet"
        write(made, path)
        again = read(path)
        assert_equal(made, again)
        assert again.annotated == made.annotated
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write(again, path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert [p.name for p in path.parent.iterdir()] == ["t.parquet"]


def test_file_states_schema_version_and_types(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(build([one_episode()]), path)
    schema = pq.read_schema(path)
    assert schema.metadata[b"trajectory_schema"] == str(SCHEMA_VERSION).encode()
    assert schema.field("input_ids").type.value_type == pa.int32()
    assert schema.field("role").type.value_type == pa.uint8()
    assert schema.field("sampled").type.value_type == pa.bool_()
    assert schema.field("logprob").type.value_type == pa.float32()
    assert [field.name for field in schema.field("turns").type.value_type] == [
        "start",
        "end",
        "reward",
        "action",
        "valid",
        "state_key",
        "well_formed",
        "ended",
    ]
    columns = pq.ParquetFile(path).metadata.row_group(0)
    assert {columns.column(i).compression for i in range(columns.num_columns)} == {"ZSTD"}


def test_more_episodes_than_a_row_group(tmp_path: Path) -> None:
    path, made = tmp_path / "t.parquet", build([one_episode(episode_id=str(i)) for i in range(1500)])
    write(made, path)
    assert pq.ParquetFile(path).num_row_groups == 2
    assert_equal(read(path), made)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    write(build([one_episode()]), path)
    before = path.read_bytes()

    def fail(where: Path, content: bytes) -> int:
        with where.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        write(build([one_episode(episode_id="other")]), path)
    assert path.read_bytes() == before


# --------------------------------------------------------------------------------------- files of another kind


def refusal(path: Path) -> str:
    with pytest.raises(TrajectoryError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.parquet")


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for content in (b"", b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"):
        path.write_bytes(content)
        refusal(path)


def test_truncated_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(build([one_episode(episode_id=str(i)) for i in range(20)]), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        refusal(path)


def test_damaged_pages_are_named_not_read(tmp_path: Path) -> None:
    """The last byte of any column's data: a checksum tells."""
    path = tmp_path / "t.parquet"
    write(build([one_episode(episode_id=str(i), split=i, parent="0") for i in range(20)]), path)
    whole, columns = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0)
    for index in range(columns.num_columns):
        column = columns.column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        damaged = bytearray(whole)
        damaged[start + column.total_compressed_size - 1] ^= 0x55
        path.write_bytes(damaged)
        refusal(path)


def test_files_of_another_schema_are_named(tmp_path: Path) -> None:
    path, table = tmp_path / "t.parquet", to_table(build([one_episode()]))

    def message(changed: pa.Table) -> str:
        write_parquet(changed, path)
        return refusal(path)

    assert "none" in message(table.replace_schema_metadata(None))
    for version in (1, 2, 4):
        other = table.replace_schema_metadata({"trajectory_schema": str(version)})
        found = f"trajectory schema {version} found, 3 expected"
        assert message(other).endswith(f"another version of this code wrote it, `dvc repro` makes it again: {found}")
    assert "missing columns: temperature" in message(table.drop_columns(["temperature"]))
    assert "logprob" in message(table.drop_columns(["logprob"]))
    assert "turns" in message(table.drop_columns(["turns"]))
    turns = pa.array([[{"start": 0}]])
    assert "turns.end, turns.reward" in message(table.set_column(table.column_names.index("turns"), "turns", turns))
    shorter = pa.array([[0.0]], type=pa.list_(pa.float32()))
    assert "entropy" in message(table.set_column(table.column_names.index("entropy"), "entropy", shorter))


def test_what_no_episode_can_hold_is_named(tmp_path: Path) -> None:
    path, made = tmp_path / "t.parquet", build([one_episode(), one_episode()])

    def message(**columns: Any) -> str:
        write(replace(made, **columns), path)
        return refusal(path)

    def changed(name: str, value: float) -> np.ndarray:
        values = getattr(made, name).copy()
        values[5] = value
        return values

    assert "column role holds 7; allowed: 0 to 6" in message(role=changed("role", 7))
    assert "column input_ids holds -3" in message(input_ids=changed("input_ids", -3))
    assert "column logprob" in message(logprob=changed("logprob", np.nan))
    assert "column entropy" in message(entropy=changed("entropy", np.inf))
    assert "missing columns: ref_logprob, ref_entropy" in message(energy=made.logprob)
    turns = {name: list(values) for name, values in made.turns.items()}
    assert "column turns" in message(turns=turns | {"end": [99, *turns["end"][1:]]})
    assert "column turns.reward" in message(turns=turns | {"reward": [np.inf, *turns["reward"][1:]]})
    assert "column return" in message(episodes=made.episodes | {"return": [np.nan, 0.0]})
    write(replace(made, entropy=changed("entropy", np.nan)), path)
    assert np.isnan(read(path).entropy[5])  # an engine could not tell it
