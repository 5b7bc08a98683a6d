"""What evaluations found, a row per episode, as a Parquet file: the input of every comparison."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.trajectories.parquet import mistakes, parquet_table, read_parquet, write_parquet
from pipeline.trajectories.trajectory import RESPONSES, TrajectoryError

SCHEMA_VERSION = 1
VERSION_KEY = b"results_schema"

COLUMNS = {
    "environment": pa.string(),
    "method": pa.string(),
    "seed": pa.int64(),
    "temperature": pa.float64(),
    "state": pa.string(),
    "rollout": pa.int64(),
    "success": pa.bool_(),
    "return": pa.float64(),
    "end_reason": pa.string(),
    "turns": pa.int64(),
    **{f"{kind}_turns": pa.int64() for kind in RESPONSES},
    "tokens": pa.int64(),
    "action_tokens": pa.int64(),
}
"""See ``pipeline.evaluation.evaluate.episode_results``."""


def write_results(table: pa.Table, path: Path) -> None:
    """Write a table of ``COLUMNS``; equal tables give equal bytes. An existing file is replaced at once."""
    write_parquet(table.replace_schema_metadata({VERSION_KEY: str(SCHEMA_VERSION)}), path)


def read_results(path: Path) -> pa.Table:
    """Read a file written by ``write_results``.

    Raises:
        TrajectoryError: it is missing, damaged, of another schema, or holds what no episode can have; it is named.
    """
    table = read_parquet(path)
    version = (table.schema.metadata or {}).get(VERSION_KEY, b"1").decode(errors="replace")  # it had none at first
    if version != str(SCHEMA_VERSION):
        raise TrajectoryError(
            f"{path}: another version of this code wrote it, `dvc repro` makes it again: "
            f"results schema {version} found, {SCHEMA_VERSION} expected"
        )
    return _checked(table, str(path))


def results_of(content: bytes, place: str) -> pa.Table:
    """The same of a file's content from another revision, whose code may not have put a checksum and a version into it.

    Raises:
        TrajectoryError: it is no table of results; ``place`` is what the message calls it.
    """
    return _checked(parquet_table(content, place), place)


def _checked(table: pa.Table, place: str) -> pa.Table:
    wrong = next(mistakes(table, COLUMNS, ("return",)), None) or next(_impossible(table), None)
    if wrong is not None:
        raise TrajectoryError(f"{place}: {wrong}")
    return table


def _impossible(table: pa.Table) -> Iterator[str]:
    """What no episode can have; seeds and returns may be below 0. Returns that are not finite are the comparison's to name."""
    for name, kind in COLUMNS.items():
        if name in ("seed", "return") or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            continue
        values = table.column(name).to_numpy()
        if not np.isfinite(values).all():
            yield f"column {name} holds numbers that are not finite"
        if (values < 0).any():
            yield f"column {name} holds {values.min()}, a number below 0"
