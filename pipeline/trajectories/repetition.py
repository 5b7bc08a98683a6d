"""How much responses repeat themselves."""

import numpy as np

from pipeline.trajectories.trajectory import Trajectories

RUN = 4
"""Tokens of a run that is looked for again."""


def repetition(trajectories: Trajectories) -> float:
    """Share of the runs of four tokens in a response that have stood in the same response before, in [0, 1].

    ``seq-rep-4`` of arXiv 1908.04319, over all responses together. Runs of sampled tokens count; 0 where there are none.
    """
    ids, owner = trajectories.input_ids[trajectories.sampled], trajectories.token_turn()[trajectories.sampled]
    starts = np.arange(max(0, len(ids) - RUN + 1))
    starts = starts[owner[starts] == owner[starts + RUN - 1]]
    runs = np.stack([owner[starts], *(ids[starts + place] for place in range(RUN))], axis=1)
    return 1 - len(np.unique(runs, axis=0)) / len(runs) if len(runs) else 0.0
