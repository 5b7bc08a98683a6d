"""Which groups of trajectories are trained on."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import TokenBatch
from pipeline.settings.filter import AllGroups, RewardVariance


def all_groups(batch: TokenBatch, section: AllGroups) -> Bool[Tensor, " e"]:
    """Keep every trajectory."""
    return torch.ones_like(batch.success)


def group_deviation(returns: Float[Tensor, " e"], group: Int[Tensor, " e"]) -> Float[Tensor, " g"]:
    """Population standard deviation of the returns within each group; exactly 0 where all are equal."""
    groups = int(group.max()) + 1
    deviation = torch.zeros(groups, dtype=returns.dtype)
    for index in range(groups):
        members = returns[group == index]
        if len(members) and not bool((members == members[0]).all()):
            deviation[index] = members.std(unbiased=False)
    return deviation


def reward_variance(batch: TokenBatch, section: RewardVariance) -> Bool[Tensor, " e"]:
    """Keep the ``ceil(keep * g)`` groups whose returns vary most (StarPO-S, arXiv 2504.20073).

    Groups of equal returns are always dropped (DAPO, arXiv 2503.14476), so fewer may remain, or none. Ties go to the
    group that comes first.
    """
    deviation = group_deviation(batch.returns, batch.group)
    order = torch.sort(deviation, descending=True, stable=True).indices
    chosen = torch.zeros(len(deviation), dtype=torch.bool)
    room = max(1, math.ceil(round(section.keep * len(deviation), 9)))  # 0.28 * 25 is 7.000000000000001
    chosen[order[:room]] = True
    return (chosen & (deviation > 0))[batch.group]
