"""Text environments: gymnasium environments whose observations and actions are text.

Importing this package registers ours with gymnasium. What the collector needs beyond ``gymnasium.Env`` is in
``TextEnvironment``.
"""

from pipeline.environments.making import make
from pipeline.environments.splits import initial_states, split_of
from pipeline.environments.text_environment import TextEnvironment

__all__ = ["TextEnvironment", "initial_states", "make", "split_of"]
