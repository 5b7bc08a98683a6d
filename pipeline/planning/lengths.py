"""How long an iteration's episodes are: as they were sampled, or the longest that the settings allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import Role, Trajectories


@dataclass(frozen=True)
class Lengths:
    """Tokens of E episodes."""

    prompt: Int[np.ndarray, " e"]
    """Of the opening, which a group shares."""
    whole: Int[np.ndarray, " e"]
    """Of the episode, its prompt's among them."""
    sampled: Int[np.ndarray, " e"]
    turns: Int[np.ndarray, " e"]
    group: Int[np.ndarray, " e"]
    """Number of each episode's group."""
    roles: float
    """Roles of a response that an episode has, on average."""

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def spread(self) -> float:
        """Standard deviation of the sampled tokens over their mean."""
        return float(self.sampled.std() / self.sampled.mean()) if self.sampled.any() else 0.0


def sampled_lengths(episodes: Trajectories) -> Lengths:
    """Of episodes that were sampled."""
    count, owner = len(episodes), episodes.token_episode
    prompt = np.bincount(owner[episodes.role == Role.PROMPT], minlength=count)
    sampled = np.bincount(owner[episodes.sampled], minlength=count)
    held = {
        (int(e), int(role)) for e, role in zip(owner[episodes.sampled], episodes.role[episodes.sampled], strict=True)
    }
    turns = np.diff(episodes.turn_offsets)
    return Lengths(prompt, episodes.lengths, sampled, turns, episodes.groups, len(held) / count)


def longest_lengths(config: Config, environment: str) -> Lengths:
    """Of an iteration in which every episode has all its turns and every response is as long as it may be.

    What is left of ``context_tokens`` is spread evenly over the prompt and the observations.
    """
    section, rollout = config.environments[environment], config.rollout
    turns, context = section.max_turns, section.context_tokens
    sampled = min(turns * section.response_tokens, context - turns) if context > turns else context - 1
    rest = context - sampled
    count = rollout.groups * rollout.group_size
    group = np.repeat(np.arange(rollout.groups), rollout.group_size)
    prompt, whole, said, spoken = (
        np.full(count, number) for number in (max(1, rest // turns), context, sampled, turns)
    )
    return Lengths(prompt, whole, said, spoken, group, 4.0)
