"""Arrow tables in Parquet files that carry a checksum of their own beside those of their pages."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import CHECKSUM, never_sealed, read_bytes, write_bytes
from pipeline.workspace.seals import BLANK, name_of, require_sealed, sealed

ROWS = 1024
"""Of a row group."""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write as zstd Parquet; equal tables give equal bytes under equal names. An existing file is replaced at once."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size=ROWS)
        writer.add_key_value_metadata({CHECKSUM: BLANK.decode()})
    write_bytes(path, sealed(sink.getvalue().to_pybytes(), name_of(path)))


def read_parquet(path: Path) -> pa.Table:
    """Read a file written by ``write_parquet``.

    Raises:
        TrajectoryError: it is missing or not as it was written; the message names the file.
    """
    return parquet_table(_whole(path), str(path))


def parquet_table(content: bytes, place: str) -> pa.Table:
    """What a Parquet file holds, whoever wrote it; ``place`` is what errors call it.

    Raises:
        TrajectoryError: it is not Parquet.
    """
    try:
        return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrajectoryError(f"{place}: not a readable Parquet file: {reason}") from None


def copy_parquet(source: Path, target: Path) -> None:
    """Copy a file written by ``write_parquet``, which is then the target by its checksum, too.

    Raises:
        TrajectoryError: the source is missing or not as it was written.
    """
    content = _whole(source)
    write_bytes(target, content if never_sealed(content) else sealed(content, name_of(target)))


def _whole(path: Path) -> bytes:
    """The content of a file that is as it was written, or of before there were checksums."""
    try:
        content = read_bytes(path)
        if not never_sealed(content):
            require_sealed(content, path)
    except UserError as error:
        raise TrajectoryError(str(error)) from None
    return content


def mistakes(table: pa.Table, types: Mapping[str, pa.DataType], optional: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with a table that should have columns of these types, with a value in every row of all but ``optional``
    ones. Other columns are not looked at."""
    missing = [name for name in types if name not in table.column_names]
    if missing:
        yield f"missing columns: {', '.join(missing)}"
        return
    for name, kind in types.items():
        column = table.column(name)
        if column.type != kind:
            yield f"column {name} holds {column.type}, {kind} expected"
        elif name not in optional and column.null_count:
            yield f"column {name} has rows without a value"
