"""A training's last episodes, with what the update made of their tokens: kept as a table for the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.training.iteration import Iteration
from pipeline.training.update import Learner
from pipeline.trajectories.trajectory import Trajectories

COLUMNS = ("advantage", "weight", "coefficient")
"""What an update makes of a token: A_t, the weight that the weight slot gives it, and c_t after aggregation."""


def update_columns(iteration: Iteration, learner: Learner) -> dict[str, np.ndarray]:
    """Advantage, token weight and c_t of all tokens that an iteration has collected; of several passes the last c_t.

    Returns:
        ``advantage``, ``weight`` and ``coefficient``: float32 (N,), NaN where nothing was trained (prompts, observations,
        forced tokens, episodes that the filter dropped).
    """
    found = {name: np.full(len(iteration.episodes.input_ids), np.nan, dtype=np.float32) for name in COLUMNS}
    for rows in iteration.minibatches:
        minibatch = learner.with_coefficients(iteration.table.select(rows))
        for name, column in found.items():
            column[minibatch["place"].numpy()] = minibatch[name].float().numpy()
    return found


def write_episodes(path: Path, trajectories: Trajectories, columns: Mapping[str, np.ndarray]) -> None:
    """Write trajectories with further columns of a number per token (NaN becomes null); equal values, equal bytes."""
    table, offsets = trajectories.to_table(), pa.array(trajectories.offsets, type=pa.int32())
    for name, values in columns.items():
        numbers = pa.array(values, type=pa.float32(), from_pandas=True)
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, numbers))
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd", row_group_size=1024, write_page_checksum=True)
    partial.replace(path)
