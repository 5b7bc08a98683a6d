"""What an update made of the tokens of a training's last episodes: columns of their table, kept for the report."""

import numpy as np

from pipeline.training.iteration import Iteration
from pipeline.training.update import Learner

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
