"""Whether there is anything to learn from some episodes."""

import numpy as np

from pipeline.trajectories.trajectory import Trajectories

FEW = 0.05
"""Share of valid turns below which a policy is taken not to know the format."""


def why_nothing_to_learn(trajectories: Trajectories) -> str:
    """What keeps a method from learning from these episodes, in words; empty where nothing does.

    Hardly any turn has an action that may be done, or the returns of no group vary: then all advantages are zero.
    """
    responses, returns, groups = trajectories.responses, trajectories.returns, trajectories.groups
    valid = responses.count("valid")
    if valid < FEW * len(responses):
        return f"{valid} of {len(responses)} turns are valid"
    members = [returns[groups == group] for group in range(int(groups.max()) + 1)]
    if not any(np.ptp(own) for own in members):
        return f"of {len(members)} groups none has returns that vary"
    return ""
