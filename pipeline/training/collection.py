"""Where an iteration's episodes come from: sampled one by one, or grown as trees, and annotated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from pipeline.energy.annotate import annotate, score_trajectories, with_entropies
from pipeline.model.memory import tokens_per_forward
from pipeline.model.policy import Policy
from pipeline.progress.display import span
from pipeline.progress.timing import Phases
from pipeline.rollout.branch_scores import blank_tokens, branch_scores
from pipeline.rollout.branching import updates_first
from pipeline.rollout.candidates import Likeliest, likeliest
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.episode import Setup
from pipeline.rollout.forest import Forest
from pipeline.rollout.sampler import Sampler, sample_episodes
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.settings.branching import Branching, Independent, Positions
from pipeline.settings.params import Config
from pipeline.training.ahead import Ahead
from pipeline.training.checks import Agreement, recomputed
from pipeline.training.team import ALONE, Team
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
    """Where episodes come from."""
    engine: Sampler
    """An engine, or workers that hold one each."""
    policy: Policy
    """What is trained; the engine samples from it, or from a copy in the precision of the reference policy."""
    reference: Policy
    """Frozen."""
    phases: Phases
    """Told how long everything takes."""
    first: Trajectories | None = None
    """The annotated episodes of iteration 0 if the rollout stage has already sampled them; trees begin anew, and so does
    what is to be ``closing``."""
    closing: bool = False
    """Episodes that are cut off end with the observation after their last response, of which a critic is asked."""
    team: Team = ALONE
    """Each of its processes samples and annotates groups of its own."""
    ahead: Ahead | None = None
    """Where workers sample one iteration ahead: what they have of the next one."""

    def collect(self, number: int, entropy_before: float = 0.0) -> Iterator[list[Trajectories]]:
        """The episodes of an iteration, round by round, each sampled with the policy as it is when it is asked for.

        There is one round, or two where branches are placed by how the policy has moved: the initial episodes, and, once
        the policy has been updated on these, all of them with their branches. Those of a round that this process samples come
        in waves, in the order of sampling; a wave is annotated already if it is from the table, or what branches begin in.
        ``entropy_before`` is the mean entropy of the iteration before, nats; 0 if there is none.
        """
        self.engine.sync(self.policy, number)
        if isinstance(self.branching, Independent):
            yield [self._independent(number)]
            return
        setup = Setup(self.policy.tokenizer, self.config, self.name, self.phases, self.closing)
        engine = cast(RolloutEngine, self.engine)  # with workers there are no trees (see ``Config``)
        temperature = self.config.rollout.temperature
        yield from self._grow(Forest(engine, setup, self._specs(number), self.branching, temperature, entropy_before))

    def _independent(self, number: int) -> Trajectories:
        """An iteration's episodes without branches: from the table, sampled ahead, or sampled now; those of the next one are
        begun then, if they are to be ahead."""
        first = self.first if number == 0 and not self.closing else None
        episodes = self._sampled(number) if first is None else self.team.own(first)
        if self.ahead is not None and number + 1 < self.config.train.iterations:
            temperature = self.config.rollout.temperature
            self.ahead.begin(number + 1, self.name, self._specs(number + 1), temperature, self.closing)
        return episodes

    def _sampled(self, number: int) -> Trajectories:
        if self.ahead is not None:
            with self.phases.phase("collect"), span("sampling", *SAMPLING):
                episodes = self.ahead.take(number)
            if episodes is not None:
                return episodes
        specs = self._specs(number)
        shared = self.policy.tokenizer, self.config, self.name, specs, self.config.rollout.temperature
        with self.phases.phase("collect"), span("sampling", *SAMPLING):
            return sample_episodes(self.engine, *shared, self.phases, self.closing)

    def _specs(self, number: int) -> list[EpisodeSpec]:
        with self.phases.phase("reset"):  # states are drawn by resetting
            specs = iteration_specs(self.config, self.name, self.seed, number)
        return [specs[row] for row in self.team.own_rows([spec.group_id for spec in specs])]

    def _grow(self, forest: Forest) -> Iterator[list[Trajectories]]:
        waves: list[Trajectories] = []
        while (wave := self._wave(forest)) is not None:
            waves.append(wave)
            if isinstance(self.branching, Positions) and len(waves) == 1:
                waves = [self._annotated(waves)]
                if updates_first(self.branching):
                    yield waves
                    self.engine.sync(self.policy, self.engine.policy_version)  # it is another one now
                initial = self.team.gathered(waves[0])
                forest.score(initial, self._scores(self.branching, initial), self._likeliest(self.branching, initial))
        yield waves

    def _wave(self, forest: Forest) -> Trajectories | None:
        with self.phases.phase("collect"), span("sampling", *SAMPLING):
            wave = forest.wave()
        if wave is not None and np.isnan(wave.entropy).any():  # by which trees may grow
            wave = with_entropies(wave, self._entropies(wave))
            forest.tell_entropies(wave)
        return wave

    def _entropies(self, trajectories: Trajectories) -> np.ndarray:
        """float32 (N,): of every sampled token, at the temperature that it was sampled at."""
        entropy = np.zeros(len(trajectories.input_ids), dtype=np.float32)
        temperatures = np.array(trajectories.episodes["temperature"])
        for temperature in np.unique(temperatures):
            rows = np.flatnonzero(temperatures == temperature)
            own = np.isin(trajectories.token_episode, rows)
            entropy[own] = self.now(trajectories.select(rows), float(temperature))[1]
        return entropy

    def annotate(self, waves: Sequence[Trajectories]) -> Trajectories:
        """A round's episodes, those of a group together, with the reference policy's scores: of all processes.

        Wave by wave, because float rounding depends on what shares a forward pass.
        """
        return self.team.gathered(self._annotated(waves))

    def _annotated(self, waves: Sequence[Trajectories]) -> Trajectories:
        settings = self.config.rollout.temperature, tokens_per_forward(self.config, self.reference)
        with self.phases.phase("annotate"), span("reference scores", *SCORING):
            parts = [wave if wave.annotated else annotate(wave, self.reference, *settings) for wave in waves]
        if len(parts) == 1:
            return parts[0]
        grown = concatenate(parts)
        return grown.select(np.argsort(grown.groups, kind="stable"))

    def _scores(self, section: Positions, initial: Trajectories) -> np.ndarray:
        shift = self.now(initial)[0] - initial.logprob if updates_first(section) else np.zeros(len(initial.input_ids))
        scores, blank = np.zeros(len(initial.input_ids)), blank_tokens(self.policy.tokenizer, initial.input_ids)
        for group in dict.fromkeys(initial.episodes["group_id"]):  # each with draws of its own
            rows = [row for row, own in enumerate(initial.episodes["group_id"]) if own == group]
            tokens = np.isin(initial.token_episode, rows)
            draws = generator(self.seed, "branch scores", group)
            scores[tokens] = branch_scores(section, initial.select(rows), draws, shift[tokens], blank[tokens])
        return scores

    def _likeliest(self, section: Positions, initial: Trajectories) -> Likeliest | None:
        """What branches may begin with at each place, and the token that stands there, if they do not sample it."""
        if section.candidates == "sampled":
            return None
        temperature, most = self.config.rollout.temperature, tokens_per_forward(self.config, self.policy)
        with self._reading():
            return likeliest(self.policy, initial, temperature, most, section.width + 1)

    def agreement(self, episodes: Trajectories, number: int) -> Agreement:
        """How far some of an iteration's episodes are from what the policy gives them (see ``recomputed``).

        Those that were sampled ahead were looked at in the iteration before, while the policy still had their weights; so
        the next one's are looked at now, as soon as some of them have ended. It must not have been updated yet.
        """
        found = None if self.ahead is None else self.ahead.agreements.pop(number, None)
        if found is None:
            draws = generator(self.seed, "recomputed", number)
            found = recomputed(episodes, self.now, draws, everything=number == 0)
        if self.ahead is not None and (some := self.ahead.first()) is not None:
            draws = generator(self.seed, "recomputed", number + 1)
            self.ahead.agreements[number + 1] = recomputed(some, self.now, draws)
        return found

    @property
    def mixed(self) -> bool:
        """Whether episodes are sampled in another precision than they are trained on, or by other code."""
        apart = self.config.rollout.engine.kind == "vllm"
        return apart or self.policy.computing is not None or self.policy.model.dtype != self.reference.model.dtype

    def rescored(self, trajectories: Trajectories) -> Trajectories:
        """Episodes with the log-probabilities and entropies that an update begins with, at ``rollout.temperature``.

        Those are the policy's as it is where episodes were sampled in another precision, by other code or ahead, so that
        ratios begin at 1; or at another temperature: REINFORCE has no ratio to what they were drawn from.
        """
        usual = self.config.rollout.temperature, self.engine.policy_version if self.ahead is not None else None
        versions = trajectories.episodes["policy_version"] if self.ahead is not None else [None] * len(trajectories)
        sampled = zip(trajectories.episodes["temperature"], versions, strict=True)
        others = [e for e, own in enumerate(sampled) if self.mixed or own != usual]
        if not others:
            return trajectories
        tokens = np.isin(trajectories.token_episode, others)
        logprob, entropy = trajectories.logprob.copy(), trajectories.entropy.copy()
        logprob[tokens], entropy[tokens] = self.now(trajectories.select(others))
        return replace(trajectories, logprob=logprob, entropy=entropy)

    def now(self, trajectories: Trajectories, temperature: float | None = None) -> list[np.ndarray]:
        """Log-probability and entropy of every sampled token under the policy as it is, at ``rollout.temperature`` or
        another one."""
        temperature, most = temperature or self.config.rollout.temperature, tokens_per_forward(self.config, self.policy)
        with self._reading():
            return score_trajectories(self.policy, trajectories, temperature, most)[:2]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The policy reads what was sampled: without dropout, and told as annotation."""
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            with self.phases.phase("annotate"):
                yield
        finally:
            self.policy.model.train(was_training)
