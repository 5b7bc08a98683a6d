"""The episodes of one initial state as a tree, and where in it an episode may begin."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.rollout.candidates import Likeliest
from pipeline.rollout.episode import Episode
from pipeline.rollout.specs import EpisodeSpec


class Candidate(NamedTuple):
    """A token that a branch begins with, though nothing has drawn it."""

    token: int
    logprob: float
    """Under the policy that samples, at ``rollout.temperature``."""
    entropy: float
    """Of the distribution that predicts it, nats."""


class Origin(NamedTuple):
    """Where an episode of a tree begins."""

    parent: int | None = None
    """Number of the episode that it branches from; None: at the initial state."""
    split: int = 0
    """Tokens shared with that; the next one is sampled again."""
    temperature: float | None = None
    """Of its sampling; None: ``rollout.temperature``."""
    candidate: Candidate | None = None
    """Its first token behind the split; None: one is sampled."""


ROOT = Origin()


@dataclass
class Tree:
    """The episodes of one initial state that have been played, in order."""

    specs: Sequence[EpisodeSpec]
    """One per episode of the budget."""
    draws: np.random.Generator
    """Named generator of the tree's own choices."""
    episodes: list[Episode] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """Where each one began; a parent has sampled the token before the split itself."""
    scores: list[np.ndarray] = field(default_factory=list)
    """Per episode a score of each of its tokens as a place to branch, if the choice asks for it."""
    likeliest: list[Likeliest] = field(default_factory=list)
    """Per episode the likeliest tokens at each of its places, if the choice asks for them."""
    entropy_before: float = 0.0
    """Nats: mean entropy of the tokens of the iteration before this one; 0 if there is none."""

    @property
    def room(self) -> int:
        """How many more episodes the budget holds."""
        return len(self.specs) - len(self.episodes)

    def turns(self, episode: int) -> list[dict[str, Any]]:
        """Turns of an episode."""
        return self.episodes[episode].builder.turns

    def sampled(self, episode: int, turn: int | None = None) -> np.ndarray:
        """int64: positions of the tokens that the policy chose in an episode, or in one of its turns."""
        chosen: np.ndarray = np.flatnonzero(self.episodes[episode].builder.tokens["sampled"])
        if turn is not None:
            span = self.turns(episode)[turn]
            chosen = chosen[(chosen >= span["start"]) & (chosen < span["end"])]
        return chosen

    def column(self, episode: int, name: str) -> np.ndarray:
        """A per-token column of an episode."""
        return np.array(self.episodes[episode].builder.tokens[name])

    def returns(self) -> np.ndarray:
        """float64: return of each episode."""
        return np.array([episode.builder.outcome["return"] for episode in self.episodes])

    def owner(self, origin: Origin) -> Origin:
        """The same place, in the episode that has itself sampled the token before it (the oldest that holds it)."""
        while origin.parent is not None and origin.split <= self.origins[origin.parent].split:
            origin = origin._replace(parent=self.origins[origin.parent].parent)
        return origin
