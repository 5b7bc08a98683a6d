"""Text environments: gymnasium environments whose observations and actions are text.

Importing this package registers ours with gymnasium. What the collector needs beyond ``gymnasium.Env`` is in
``TextEnvironment``.
"""

from pipeline.environments.registry import TextEnvironment, environment_label, initial_states, make, split_of

__all__ = ["TextEnvironment", "environment_label", "initial_states", "make", "split_of"]
