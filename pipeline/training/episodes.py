"""A training's last episodes, with what the update made of their tokens: kept as a table for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline.training.iteration import Example, Iteration
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.files import replacing

COLUMNS = ("advantage", "weight", "coefficient")
"""What an update makes of a token: A_t, the weight that the weight slot gives it, and c_t after aggregation."""


def update_columns(
    iteration: Iteration, batches: Sequence[tuple[list[Example], list[Tensor]]]
) -> dict[str, np.ndarray]:
    """Advantage, token weight and c_t of all tokens that an iteration has collected.

    Args:
        iteration: what was trained on.
        batches: its minibatches, each with c_t of its examples; of several passes the last one counts.

    Returns:
        ``advantage``, ``weight`` and ``coefficient``: float32 (N,), NaN where nothing was trained (prompts, observations,
        forced tokens, episodes that the filter dropped).
    """
    found = {name: np.full(len(iteration.trajectories.input_ids), np.nan, dtype=np.float32) for name in COLUMNS}
    factors = {id(example): factor for batch in batches for example, factor in zip(*batch, strict=True)}
    for episode, example in zip(np.flatnonzero(iteration.kept), iteration.examples, strict=True):
        tokens = iteration.trajectories.offsets[episode] + np.flatnonzero(example.trainable)
        columns = (example.advantage, example.weight, factors[id(example)])
        for name, values in zip(COLUMNS, columns, strict=True):
            found[name][tokens] = values.float().numpy()
    return found


def write_episodes(path: Path, trajectories: Trajectories, columns: Mapping[str, np.ndarray]) -> None:
    """Write trajectories with further columns of a number per token (NaN becomes null); equal values, equal bytes."""
    table, offsets = trajectories.to_table(), pa.array(trajectories.offsets, type=pa.int32())
    for name, values in columns.items():
        numbers = pa.array(values, type=pa.float32(), from_pandas=True)
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, numbers))
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=1024, write_page_checksum=True)
