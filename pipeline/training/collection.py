"""Where an iteration's episodes come from: sampled one by one, or grown as trees, and annotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.energy.annotate import annotate, score_trajectories
from pipeline.model.policy import Policy
from pipeline.progress.display import span
from pipeline.progress.timing import Phases
from pipeline.rollout.branching import Forest
from pipeline.rollout.collector import EpisodeSpec, Setup, collect, iteration_specs
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.scores import blank_tokens, branch_scores
from pipeline.settings.branching import Branching, Independent, Positions
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import Trajectories, concatenate
from pipeline.workspace.randomness import generator

SAMPLING, SCORING = (0.0, 0.6), (0.6, 0.7)
"""About which parts of an iteration these are; it is only for telling how far it is."""


@dataclass(frozen=True)
class Collection:
    """What samples and annotates the episodes of one training."""

    config: Config
    name: str
    """Key in ``environments``."""
    seed: int
    branching: Branching
    """S1."""
    engine: RolloutEngine
    policy: Policy
    """What the engine samples from."""
    reference: Policy
    """Frozen."""
    phases: Phases
    """Told how long everything takes."""
    first: Trajectories | None = None
    """The annotated episodes of iteration 0 if the rollout stage has already sampled them; trees begin anew, and so does
    what is to be ``closing``."""
    closing: bool = False
    """Episodes that are cut off end with the observation after their last response, of which a critic is asked."""

    def rounds(self, number: int) -> Iterator[Trajectories]:
        """The annotated episodes of an iteration, to be trained on.

        There is one round, or two where branches are placed by how the policy has moved: the initial episodes, and, once
        the policy has been updated on these, all of them with their branches.
        """
        if not isinstance(self.branching, Independent):
            yield from self._grown(number)
        elif number == 0 and self.first is not None and not self.closing:
            yield self.first
        else:
            specs = self._specs(number)
            with self.phases.phase("collect"), span("sampling", *SAMPLING):
                sampled = collect(
                    self.engine,
                    self.policy.tokenizer,
                    self.config,
                    self.name,
                    specs,
                    self.config.rollout.temperature,
                    phases=self.phases,
                    closing=self.closing,
                )
            yield self._annotated(sampled)

    def _grown(self, number: int) -> Iterator[Trajectories]:
        setup = Setup(self.policy.tokenizer, self.config, self.name, self.phases, self.closing)
        temperature = self.config.rollout.temperature
        forest = Forest(self.engine, setup, self._specs(number), self.branching, temperature)
        self.engine.forget()
        parts: list[Trajectories] = []
        while (sampled := self._wave(forest)) is not None:
            parts.append(self._annotated(sampled))
            if isinstance(self.branching, Positions) and len(parts) == 1:
                if self.branching.signal == "branching_score":
                    yield parts[0]
                    self.engine.forget()  # the policy is another one now
                forest.score(parts[0], self._scores(self.branching, parts[0]))
        grown = concatenate(parts)
        place = {name: index for index, name in enumerate(grown.episodes["episode_id"])}
        yield grown.select([place[name] for name in forest.order()])

    def _specs(self, number: int) -> list[EpisodeSpec]:
        with self.phases.phase("reset"):  # states are drawn by resetting
            return iteration_specs(self.config, self.name, self.seed, number)

    def _wave(self, forest: Forest) -> Trajectories | None:
        with self.phases.phase("collect"), span("sampling", *SAMPLING):
            return forest.wave()

    def _annotated(self, sampled: Trajectories) -> Trajectories:
        with self.phases.phase("annotate"), span("reference scores", *SCORING):
            return annotate(
                sampled, self.reference, self.config.rollout.temperature, self.config.train.tokens_per_forward
            )

    def _scores(self, section: Positions, initial: Trajectories) -> np.ndarray:
        moved = np.zeros(len(initial.input_ids))
        if section.signal == "branching_score":
            moved = self.now(initial)[0] - initial.logprob
        scores, blank = np.zeros(len(initial.input_ids)), blank_tokens(self.policy.tokenizer, initial.input_ids)
        for group in dict.fromkeys(initial.episodes["group_id"]):  # each with draws of its own
            rows = [row for row, own in enumerate(initial.episodes["group_id"]) if own == group]
            tokens = np.isin(initial.token_episode, rows)
            draws = generator(self.seed, "branch scores", group)
            scores[tokens] = branch_scores(
                section.signal,
                initial.select(rows),
                draws,
                moved[tokens],
                section.discount,
                section.bounds,
                blank[tokens],
            )
        return scores

    def at_temperature(self, trajectories: Trajectories) -> Trajectories:
        """Episodes that were sampled at another temperature, with the policy's log-probabilities and entropies at
        ``rollout.temperature``: REINFORCE has no ratio to what they were drawn from."""
        temperature = self.config.rollout.temperature
        others = [e for e, own in enumerate(trajectories.episodes["temperature"]) if own != temperature]
        if not others:
            return trajectories
        scored = self.now(trajectories.select(others))
        tokens = np.isin(trajectories.token_episode, others)
        columns = [trajectories.logprob.copy(), trajectories.entropy.copy()]
        for column, values in zip(columns, scored, strict=True):
            column[tokens] = values
        return replace(trajectories, logprob=columns[0], entropy=columns[1])

    def now(self, trajectories: Trajectories, temperature: float | None = None) -> list[np.ndarray]:
        """Log-probability and entropy of every sampled token under the policy as it is, at ``rollout.temperature`` or
        another one."""
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            with self.phases.phase("annotate"), torch.inference_mode():
                return score_trajectories(
                    self.policy,
                    trajectories,
                    temperature or self.config.rollout.temperature,
                    self.config.train.tokens_per_forward,
                )[:2]
        finally:
            self.policy.model.train(was_training)
