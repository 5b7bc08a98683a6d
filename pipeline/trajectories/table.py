"""Trajectories as an Arrow table of one row per episode, and as a Parquet file."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.trajectories.parquet import mistakes, read_parquet, write_parquet
from pipeline.trajectories.trajectory import (
    ANNOTATION,
    PER_EPISODE,
    PER_TOKEN,
    PER_TURN,
    Role,
    Trajectories,
    TrajectoryError,
    offsets_of,
)
from pipeline.workspace.errors import warn
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
        TrajectoryError: the schema's version is another one; a column is missing, of another type, or not as long as it
            should be; or a number is NaN or infinite.
    """
    version = (table.schema.metadata or {}).get(b"trajectory_schema", b"none").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        again = "another version of this code wrote it, `dvc repro` makes it again"
        raise TrajectoryError(f"{again}: trajectory schema {version} found, {SCHEMA_VERSION} expected")
    table = table.combine_chunks()
    tokens, offsets = _token_columns(table)
    turns, turn_offsets = _turn_columns(table)
    for wrong in mistakes(table, PER_EPISODE, ("parent", "split", "temperature", "return")):
        raise TrajectoryError(wrong)
    trajectories = Trajectories(
        episodes={name: table.column(name).to_pylist() for name in PER_EPISODE},
        offsets=offsets,
        turn_offsets=turn_offsets,
        turns=turns,
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
        absent = 0.0 if column == "temperature" else np.nan  # nobody needs to have sampled
        told = [absent if value is None else value for value in trajectories.episodes[column]]
        values = np.array(told, dtype=np.float64)
        require_finite(f"column {column}", values, lambda row: f"episode {names[row]}")
    require_finite("column turns.reward", np.array(trajectories.turns["reward"], dtype=np.float64), turns.__getitem__)
    for column in ("logprob", "entropy", *ANNOTATION):
        values = getattr(trajectories, column)
        if values is not None:
            untold = np.isnan(values) if column == "entropy" and not trajectories.annotated else False
            require_finite(f"column {column}", np.where(untold, 0.0, values), trajectories.place)


def _token_columns(table: pa.Table) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Flat values of tokens by column, and the offsets of episodes, which all columns share."""
    kinds = {name: pa.list_(pa.from_numpy_dtype(kind)) for name, kind in PER_TOKEN.items()}
    kinds |= {name: pa.list_(pa.float32()) for name in ANNOTATION if name in table.column_names}
    for wrong in mistakes(table, kinds):
        raise TrajectoryError(wrong)
    offsets, found = np.zeros(0), dict[str, np.ndarray]()
    for name in kinds:
        own, values = _ragged(table, name)
        if found and not np.array_equal(own, offsets):
            raise TrajectoryError(f"column {name} differs in length from input_ids")
        if values.null_count:
            raise TrajectoryError(f"column {name} has a token without a value")
        offsets, found[name] = own, values.to_numpy(zero_copy_only=False)
    return found, offsets


def _turn_columns(table: pa.Table) -> tuple[dict[str, list[Any]], np.ndarray]:
    """Values of turns by column, and the offsets of episodes."""
    if "turns" not in table.column_names or not pa.types.is_list(table.schema.field("turns").type):
        raise TrajectoryError("missing columns: turns")
    offsets, struct = _ragged(table, "turns")
    if not pa.types.is_struct(struct.type) or struct.null_count:
        raise TrajectoryError("column turns holds other than turns")
    columns = {f"turns.{field.name}": struct.field(field.name) for field in struct.type}
    for wrong in mistakes(pa.table(columns), {f"turns.{name}": kind for name, kind in PER_TURN.items()}):
        raise TrajectoryError(wrong)
    return {name: columns[f"turns.{name}"].to_pylist() for name in PER_TURN}, offsets


def _ragged(table: pa.Table, name: str) -> tuple[np.ndarray, pa.Array]:
    """Offsets and flat values of a column of lists."""
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
    return offsets_of(np.asarray(array.value_lengths().fill_null(0), dtype=np.int64)), array.flatten()


def _impossible(made: Trajectories) -> Iterator[str]:
    """What no episode of a file can hold, beside numbers that are not finite."""
    if (made.role > max(Role)).any():
        yield f"column role holds {made.role.max()}; allowed: 0 to {int(max(Role))}"
    if (made.input_ids < 0).any():
        yield f"column input_ids holds {made.input_ids.min()}; token ids begin with 0"
    absent = [name for name in ANNOTATION if getattr(made, name) is None]
    if 0 < len(absent) < len(ANNOTATION):
        yield f"missing columns: {', '.join(absent)}"
    lengths, count = np.repeat(made.lengths, np.diff(made.turn_offsets)), len(made.turns["start"])
    start, end = (np.fromiter(made.turns[name], np.int64, count) for name in ("start", "end"))
    if not ((start >= 0) & (start <= end) & (end <= lengths)).all():
        yield "column turns holds a response that is not within its episode"
    if min((t for t in made.episodes["temperature"] if t is not None), default=0.0) < 0:
        yield "column temperature holds a number below 0"


def write(trajectories: Trajectories, path: str | Path, columns: Mapping[str, np.ndarray] | None = None) -> None:
    """Write as zstd Parquet; equal trajectories give equal bytes. An existing file is replaced at once.

    ``columns`` are further numbers of all tokens (N,); NaN becomes null.
    """
    table, offsets = to_table(trajectories), pa.array(trajectories.offsets, type=pa.int32())
    for name, values in (columns or {}).items():
        numbers = pa.array(values, type=pa.float32(), from_pandas=True)
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, numbers))
    write_parquet(table, Path(path))


def read(path: str | Path) -> Trajectories:
    """Read a Parquet file written by ``write``.

    Raises:
        TrajectoryError: the file is missing, damaged or of another schema, or holds what no episode can hold: a number that
            is not finite, a role or a token id that there is not, a turn outside of its episode. The message names it.
    """
    return _trajectories(read_parquet(Path(path)), path)


def read_with(path: Path, names: Iterable[str]) -> tuple[Trajectories, dict[str, np.ndarray]]:
    """As ``read``, and those of these further columns that the file has: a float32 number per token, NaN for null."""
    table = read_parquet(path)
    made, found = _trajectories(table, path), dict[str, np.ndarray]()
    for name in (name for name in names if name in table.column_names and not hasattr(made, name)):
        offsets, values = _ragged(table.combine_chunks(), name)
        if values.type != pa.float32() or not np.array_equal(offsets, made.offsets):
            raise TrajectoryError(f"{path}: column {name} is not a number per token")
        found[name] = values.to_numpy(zero_copy_only=False)
    return made, found


def kept(path: Path, make: Callable[[], Trajectories]) -> Trajectories:
    """What a file holds; where there is none, or a damaged one, what is made now, which it holds from then on."""
    if os.path.lexists(path):
        try:
            return read(path)
        except TrajectoryError as error:
            warn(f"{error}; it is made again")
    write(make(), path)
    return read(path)


def _trajectories(table: pa.Table, path: str | Path) -> Trajectories:
    try:
        made = from_table(table)
        for wrong in _impossible(made):
            raise TrajectoryError(wrong)
        return made
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from None
