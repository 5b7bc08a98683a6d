"""Trajectories as an Arrow table of one row per episode, and as a Parquet file."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.trajectories.trajectory import (
    ANNOTATION,
    PER_EPISODE,
    PER_TOKEN,
    PER_TURN,
    Trajectories,
    TrajectoryError,
    offsets_of,
)
from pipeline.workspace.files import replacing
from pipeline.workspace.finite import NotFiniteError, require_finite

SCHEMA_VERSION = 3


def to_table(trajectories: Trajectories) -> pa.Table:
    """One row per episode, as in the Parquet file: scalars, a list of turns, lists of token values."""
    columns: dict[str, pa.Array] = {
        name: pa.array(trajectories.episodes[name], type=kind) for name, kind in PER_EPISODE.items()
    }
    struct = pa.StructArray.from_arrays(
        [pa.array(trajectories.turns[name], type=kind) for name, kind in PER_TURN.items()], names=list(PER_TURN)
    )
    columns["turns"] = pa.ListArray.from_arrays(pa.array(trajectories.turn_offsets, type=pa.int32()), struct)
    token_offsets = pa.array(trajectories.offsets, type=pa.int32())
    for name in (*PER_TOKEN, *ANNOTATION):
        values = getattr(trajectories, name)
        if values is not None:
            columns[name] = pa.ListArray.from_arrays(token_offsets, pa.array(values))
    return pa.table(columns).replace_schema_metadata({"trajectory_schema": str(SCHEMA_VERSION)})


def from_table(table: pa.Table) -> Trajectories:
    """Inverse of ``to_table``.

    Raises:
        TrajectoryError: a column is missing, or the schema's version is another one; or a number is NaN or infinite.
    """
    version = (table.schema.metadata or {}).get(b"trajectory_schema", b"none").decode()
    if version != str(SCHEMA_VERSION):
        again = "another version of this code wrote it, `dvc repro` makes it again"
        raise TrajectoryError(f"{again}: trajectory schema {version} found, {SCHEMA_VERSION} expected")
    missing = [name for name in (*PER_EPISODE, "turns", *PER_TOKEN) if name not in table.column_names]
    if missing:
        raise TrajectoryError(f"missing columns: {', '.join(missing)}")
    table = table.combine_chunks()

    def ragged(name: str) -> tuple[np.ndarray, pa.Array]:
        column = table.column(name)
        array = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
        return offsets_of(np.asarray(array.value_lengths(), dtype=np.int64)), array.flatten()

    offsets, _ = ragged("input_ids")
    turn_offsets, struct = ragged("turns")
    absent = [f"turns.{name}" for name in PER_TURN if struct.type.get_field_index(name) < 0]
    if absent:
        raise TrajectoryError(f"missing columns: {', '.join(absent)}")
    tokens: dict[str, np.ndarray] = {}
    for name in (*PER_TOKEN, *(a for a in ANNOTATION if a in table.column_names)):
        own_offsets, values = ragged(name)
        if not np.array_equal(own_offsets, offsets):
            raise TrajectoryError(f"column {name} differs in length from input_ids")
        tokens[name] = values.to_numpy(zero_copy_only=False)
    trajectories = Trajectories(
        episodes={name: table.column(name).to_pylist() for name in PER_EPISODE},
        offsets=offsets,
        turn_offsets=turn_offsets,
        turns={name: struct.field(name).to_pylist() for name in PER_TURN},
        **tokens,
    )
    try:
        _require_finite_columns(trajectories)
    except NotFiniteError as error:
        raise TrajectoryError(str(error)) from None
    return trajectories


def _require_finite_columns(trajectories: Trajectories) -> None:
    """Refuse NaN, infinity and null, but for entropies that an engine could not tell and no annotation has told yet."""
    names, owner = trajectories.episodes["episode_id"], np.diff(trajectories.turn_offsets)
    turns = [f"turn {turn} of episode {name}" for name, n in zip(names, owner, strict=True) for turn in range(n)]
    for column in ("return", "temperature"):
        values = np.array(trajectories.episodes[column], dtype=np.float64)
        require_finite(f"column {column}", values, lambda row: f"episode {names[row]}")
    require_finite("column turns.reward", np.array(trajectories.turns["reward"], dtype=np.float64), turns.__getitem__)
    for column in ("logprob", "entropy", *ANNOTATION):
        values = getattr(trajectories, column)
        if values is not None:
            untold = np.isnan(values) if column == "entropy" and not trajectories.annotated else False
            require_finite(f"column {column}", np.where(untold, 0.0, values), trajectories.place)


def write(trajectories: Trajectories, path: str | Path, columns: Mapping[str, np.ndarray] | None = None) -> None:
    """Write as zstd Parquet; equal trajectories give equal bytes. An existing file is replaced at once.

    ``columns`` are further numbers of all tokens (N,); NaN becomes null.
    """
    table, offsets = to_table(trajectories), pa.array(trajectories.offsets, type=pa.int32())
    for name, values in (columns or {}).items():
        numbers = pa.array(values, type=pa.float32(), from_pandas=True)
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, numbers))
    with replacing(Path(path)) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=1024, write_page_checksum=True)


def read(path: str | Path) -> Trajectories:
    """Read a Parquet file written by ``write``.

    Raises:
        TrajectoryError: the file is missing, corrupt or of another schema; the message names the file.
    """
    try:
        return from_table(pq.read_table(path, page_checksum_verification=True))
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise TrajectoryError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from None


def kept(path: Path, make: Callable[[], Trajectories]) -> Trajectories:
    """What a file holds; where there is none, what is made now, which it holds from then on."""
    if not path.exists():
        write(make(), path)
    return read(path)
