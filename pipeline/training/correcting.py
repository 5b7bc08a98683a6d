"""Which factor every token of an update has, because it was sampled by other probabilities than the update begins with."""

import numpy as np
import torch

from pipeline.objective.correction import importance_factors
from pipeline.settings.params import Config
from pipeline.training.tokens import TokenTable
from pipeline.trajectories.trajectory import Trajectories


def corrected(
    table: TokenTable, episodes: Trajectories, rescored: Trajectories, config: Config
) -> tuple[TokenTable, dict[str, float]]:
    """The table with the column ``correction``, if ``train.correction`` asks for it; and the share of tokens out of bounds.

    ``episodes`` are as they were sampled, ``rescored`` as the update begins with them. One that was sampled at another
    temperature than ``rollout.temperature`` is drawn from something else on purpose: its factors are 1.
    """
    section = config.train.correction
    if section is None:
        return table, {}
    there = np.array(episodes.episodes["temperature"]) == config.rollout.temperature
    trainable = episodes.trainable & np.repeat(there, episodes.lengths)
    trained, sampled = torch.from_numpy(rescored.logprob), torch.from_numpy(episodes.logprob)
    owner = torch.from_numpy(episodes.token_episode)
    factor, touched = importance_factors(trained, sampled, torch.from_numpy(trainable), owner, section)
    share = float(touched[torch.from_numpy(episodes.trainable)].double().mean())
    return table.with_columns(correction=factor[table["place"]]), {"correction_touched": share}
