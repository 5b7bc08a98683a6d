"""Made-up scores of two methods whose difference is known, for tests of looks at them."""

from __future__ import annotations

import numpy as np

from pipeline.analysis.scores import Scores
from pipeline.settings.params import Config
from pipeline.workspace.randomness import generator

UNTIL = {"from": 0, "at_least": 6, "at_most": 30, "batch": 4, "until": "decided"}
STATES, ROLLOUTS = 64, 4
SEED, STATE = 0.05, 0.15
"""Standard deviations of success over seeds and initial states."""


def planted(config: Config, differences: dict[str, float], run: int) -> dict[tuple[str, str], Scores]:
    """Scores of every method at the seeds in effect: half of all episodes are solved, and of some methods more.

    A seed's scores do not depend on how many others there are. ``run`` names another repetition.
    """
    states = STATE * generator(run, "planted states").standard_normal(STATES)
    found = {}
    for method in config.methods:
        grids = []
        for seed in config.seeds:
            draws = generator(run, "planted", method, seed)
            rates = np.clip(0.5 + differences.get(method, 0.0) + SEED * draws.standard_normal() + states, 0.0, 1.0)
            grids.append(draws.random((STATES, ROLLOUTS)) < rates[:, None])
        names = tuple(f"state {number:03}" for number in range(STATES))
        for environment in config.environments:
            found[environment, method] = Scores(tuple(config.seeds), names, np.array(grids, dtype=float))
    return found
