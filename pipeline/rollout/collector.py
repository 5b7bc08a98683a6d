"""Playing episodes: environments on one side, an engine on the other, ``Trajectories`` out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, ConfigError, Environment
from pipeline.environments import environment_label, initial_states, make
from pipeline.environments.registry import parse_action, reset, step, text_of
from pipeline.prompting import END_OF_RESPONSE, Dialogue, decode, parse_response, token_roles
from pipeline.randomness import generator
from pipeline.rollout.engine import Continuation, Request, RolloutEngine, Sampling
from pipeline.timing import Phases
from pipeline.trajectory import EpisodeBuilder, Role, Trajectories, build

INVALID = "Invalid response: the state is unchanged."
"""Opens the observation after a turn without a parsable, allowed action."""


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to be played, and where its randomness comes from."""

    episode_id: str
    group_id: str
    state_seed: int
    seed: int
    iteration: int
    noise: int
    """Seed of the environment's noise."""
    draws: tuple[Any, ...]
    """Name of the generator that the episode's tokens are drawn from: seed, stream, counters."""


def iteration_specs(config: Config, name: str, seed: int, iteration: int) -> list[EpisodeSpec]:
    """The episodes of one iteration of training: ``rollout.groups`` states of the train split, ``group_size`` each.

    They depend on (environment, seed, iteration) alone, so every method meets the same states and the same noise.
    """
    draws = generator(seed, "train states", name, iteration)
    states = initial_states(make(config.environments[name]), "train", config.rollout.groups, draws)
    return group_specs(name, states, config.rollout.group_size, seed, iteration, "train")


def group_specs(
    name: str, states: Sequence[int], group_size: int, seed: int, iteration: int, purpose: str
) -> list[EpisodeSpec]:
    """``group_size`` episodes of each initial state, with noise and draws of their own."""
    specs = []
    for group, state in enumerate(states):
        for member in range(group_size):
            place = (name, purpose, iteration, group, member)
            specs.append(
                EpisodeSpec(
                    episode_id=f"{name}-{purpose}-{seed}-{iteration}-{group}-{member}",
                    group_id=f"{name}-{purpose}-{seed}-{iteration}-{group}",
                    state_seed=state,
                    seed=seed,
                    iteration=iteration,
                    noise=int(generator(seed, "environment noise", *place).integers(2**31)),
                    draws=(seed, "tokens", *place),
                )
            )
    return specs


def collect(
    engine: RolloutEngine,
    tokenizer: Any,
    config: Config,
    name: str,
    specs: Sequence[EpisodeSpec],
    temperature: float,
    progress: Callable[[int], None] = lambda episodes: None,
    phases: Phases | None = None,
) -> Trajectories:
    """Play episodes to their end.

    Args:
        engine: samples the policy's responses.
        tokenizer: the policy's.
        config: params.yaml.
        name: key in ``environments``.
        specs: what to play.
        temperature: of sampling.
        progress: called with 1 whenever an episode is finished.
        phases: told how long the environment takes: ``reset`` and ``step``.

    Returns:
        The episodes in the order of ``specs``.

    Raises:
        ConfigError: the environment raised, or returned what it must not (see ``registry.step``); its openings differ
            within a group, or leave no room in ``context_tokens``.
    """
    section = config.environments[name]
    dialogue = Dialogue(tokenizer, section.layout, config.rollout.prefill, section.response_tokens)
    phases = phases or Phases()
    episodes: list[_Episode] = []
    prompts: dict[str, list[int]] = {}

    def requests() -> Iterator[Request]:
        for spec in specs:
            episode = _Episode(section, dialogue, spec, phases)
            if prompts.setdefault(spec.group_id, episode.prompt) != episode.prompt:  # invariant 3
                raise ConfigError(
                    f"environments: {section.id!r} opens group {spec.group_id} with different prompts; observation and "
                    "instructions after a reset must depend on state_seed alone"
                )
            episodes.append(episode)
            yield episode.request()

    def follow(number: int, answer: Continuation) -> Request | None:
        episode = episodes[number]
        episode.take(answer)
        if not episode.done:
            return episode.request()
        progress(1)
        return None

    engine.forget()
    engine.generate(requests(), Sampling(temperature, END_OF_RESPONSE), follow)
    return build([episode.builder for episode in episodes])


class _Episode:
    """One environment, its dialogue and the tokens so far."""

    def __init__(self, section: Environment, dialogue: Dialogue, spec: EpisodeSpec, phases: Phases) -> None:
        self.section, self.dialogue, self.spec, self.done, self.turn = section, dialogue, spec, False, 1
        self.phases = phases
        self.draws = generator(*spec.draws)
        with phases.phase("reset"):
            self.environment = make(section)
            self.observation = reset(self.environment, spec.noise, spec.state_seed)
            instructions = text_of(self.environment, "instructions")
        self.builder = EpisodeBuilder(
            episode_id=spec.episode_id,
            group_id=spec.group_id,
            environment=environment_label(section),
            state_key=self._state_key(),
            seed=spec.seed,
            iteration=spec.iteration,
        )
        opening = dialogue.opening(instructions, self.observation, self._actions_left())
        self.builder.append_text(opening, Role.PROMPT)
        self.prompt = list(self.builder.ids)
        if len(opening) + len(dialogue.prefill_ids) >= section.context_tokens:
            raise ConfigError(
                f"environments: a prompt of {len(opening)} tokens leaves no room in context_tokens "
                f"({section.context_tokens}); raise it"
            )

    def request(self) -> Request:
        """Force the prefill, then ask for a response."""
        self._start = len(self.builder)
        prefill = self.dialogue.prefill_ids
        self.builder.append_text(prefill, Role.THINK_TAG)
        uniforms = self.draws.random(self.section.response_tokens)
        room = self.section.context_tokens - len(self.builder)
        return Request(self.builder.ids, uniforms[: max(1, room)], forced=len(prefill))

    def take(self, answer: Continuation) -> None:
        """Record a response, act on it and prepare the next turn."""
        prefill = self.dialogue.prefill_ids
        response = decode(self.dialogue.tokenizer, [*prefill, *answer.ids])
        roles = token_roles(response)[len(prefill) :]
        self.builder.identity["policy_version"] = answer.policy_version
        self.builder.append_sampled(answer.ids, roles, answer.logprob, answer.entropy)
        text = response.text
        if answer.finish == "eos":
            text = text[: response.spans[-1][0]]
        written = parse_response(text, self.section.actions_per_turn)
        with self.phases.phase("step"):
            state_key = self._state_key()
            actions = self._allowed(written)
            reward, over = self._act(actions)
        executed = _storable("||".join(actions)) if actions else ""
        self.builder.close_turn(self._start, reward, executed, actions is not None, state_key)
        if over:
            self._finish("goal" if self.environment.success else "failed")
        elif self.turn == self.section.max_turns:
            self._finish("turns")
        else:
            self._next_turn(reward, answer.ids[-1] == self.dialogue.tokenizer.eos_token_id)

    def _allowed(self, actions: list[str] | None) -> list[str] | None:
        """Canonical actions, or None as soon as one is not allowed."""
        parsed = [parse_action(self.environment, action) for action in actions or []]
        return [p for p in parsed if p is not None] if parsed and None not in parsed else None

    def _act(self, actions: list[str] | None) -> tuple[float, bool]:
        """Execute a turn's actions; returns its reward and whether the environment's episode is over."""
        if actions is None:
            if not self.observation.startswith(INVALID):
                self.observation = f"{INVALID}\n{self.observation}"
            return self.section.format_penalty, False
        total = 0.0
        for action in actions:
            self.observation, reward, over = step(self.environment, action)
            total += reward
            if over:
                return total, True
        return total, False

    def _next_turn(self, reward: float, ended_by_eos: bool) -> None:
        self.turn += 1
        following = self.dialogue.following(self.turn, self.observation, reward, ended_by_eos, self._actions_left())
        if len(self.builder) + len(following) + len(self.dialogue.prefill_ids) >= self.section.context_tokens:
            self._finish("context")
        else:
            self.builder.append_text(following, Role.OBSERVATION)

    def _finish(self, reason: str) -> None:
        self.done = True
        self.builder.finish(bool(self.environment.success), reason)

    def _actions_left(self) -> int | None:
        return getattr(self.environment, "actions_left", None)

    def _state_key(self) -> str:
        return _storable(text_of(self.environment, "state_key"))


def _storable(text: str) -> str:
    """Text as UTF-8 can hold it: lone surrogates are spelt out, so that what differs still does."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
