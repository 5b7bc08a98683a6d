"""One episode: an environment and the dialogue with it, from prompt to outcome, with every token's role."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.environments import make
from pipeline.environments.playing import actions_left_of, outcome_of, parse_action, reset, step, success_of, text_of
from pipeline.progress.timing import Phases
from pipeline.rollout.engine import Continuation, Request
from pipeline.rollout.specs import EpisodeSpec
from pipeline.settings.params import Config
from pipeline.trajectories.builder import EpisodeBuilder
from pipeline.trajectories.parsing import END_OF_RESPONSE, decode, parse_response, token_roles
from pipeline.trajectories.prompting import INVALID, Dialogue
from pipeline.trajectories.trajectory import CUT, Role
from pipeline.workspace.errors import UserError
from pipeline.workspace.randomness import generator


class Setup:
    """What the episodes of one environment share: its section, its dialogue, and the prompts of the groups so far.

    ``phases`` are told how long the environment takes: ``reset`` and ``step``. With ``closing``, an episode that is cut off
    ends with the observation after its last response, also beyond ``context_tokens``: with all that the policy would have
    seen when it began the next one.
    """

    def __init__(
        self, tokenizer: Any, config: Config, name: str, phases: Phases | None = None, closing: bool = False
    ) -> None:
        self.section, self.closing = config.environments[name], closing
        self.phases = phases or Phases()
        self.dialogue = Dialogue(tokenizer, self.section.layout, config.rollout.prefill, self.section.response_tokens)
        self._prompts: dict[str, list[int]] = {}

    def begin(self, spec: EpisodeSpec) -> Episode:
        """An episode before its first response.

        Raises:
            UserError: its environment opens it otherwise than the rest of its group, or see ``collect``.
        """
        episode = Episode(self, spec)
        if self._prompts.setdefault(spec.group_id, episode.prompt) != episode.prompt:  # invariant 3
            raise UserError(
                f"environments: {self.section.id!r} opens group {spec.group_id} with different prompts; observation and "
                "instructions after a reset must depend on state_seed alone"
            )
        return episode


class Episode:
    """One environment, its dialogue and the tokens so far."""

    def __init__(self, setup: Setup, spec: EpisodeSpec) -> None:
        self.setup, self.spec, self.done, self.turn = setup, spec, False, 1
        self.section, self.dialogue, self.phases = setup.section, setup.dialogue, setup.phases
        self.draws = generator(*spec.draws)
        self._begun: list[int] = []
        """Sampled tokens of the present response that a branch has from its parent."""
        with self.phases.phase("reset"):
            self.environment = make(self.section)
            self.observation = reset(self.environment, spec.noise, spec.state_seed)
            instructions = text_of(self.environment, "instructions")
        identity = {name: getattr(spec, name) for name in ("episode_id", "group_id", "seed", "iteration")}
        self.builder = EpisodeBuilder(**identity, environment=self.section.id, state_key=self._state_key())
        opening = self.dialogue.opening(instructions, self.observation, actions_left_of(self.environment))
        self.builder.append_text(opening, Role.PROMPT)
        self.prompt = list(self.builder.ids)
        if len(opening) + len(self.dialogue.prefill_ids) >= self.section.context_tokens:
            raise UserError(
                f"environments: a prompt of {len(opening)} tokens leaves no room in context_tokens "
                f"({self.section.context_tokens}); raise it"
            )
        self._open_response()

    @classmethod
    def branch(
        cls, parent: Episode, spec: EpisodeSpec, split: int, first: tuple[int, float, float] | None = None
    ) -> Episode:
        """Continue a finished episode before one of its sampled tokens, the one at ``split``, with draws of its own.

        ``first`` is a token to begin with, its log-probability and its distribution's entropy; it must not end the response.

        The environment is made anew and led to the same state: same noise, same actions, whatever ``spec`` says. What is
        random in it after the split happens as it did to the parent, as long as the policy does the same.

        Raises:
            ValueError: the policy did not choose the token at ``split``.
            UserError: the environment, led by the same actions, is not in the state that the parent was in.
        """
        spec = replace(spec, state_seed=parent.spec.state_seed, noise=parent.spec.noise)
        episode = cls(parent.setup, spec)
        episode.builder = parent.builder.before(split, **episode.builder.identity)
        with episode.phases.phase("step"):
            for turn in episode.builder.turns:
                episode._expect(turn["state_key"])
                episode._act(turn["action"].split("||") if turn["valid"] else None)
        episode.turn = len(episode.builder.turns) + 1
        turn = parent.builder.turns[len(episode.builder.turns)]
        episode._expect(turn["state_key"])
        episode._start = turn["start"]
        if first is not None:  # its role is known once the response is
            episode.builder.append_sampled([first[0]], [Role.OTHER], [first[1]], [first[2]])
        episode._begun = episode.builder.ids[turn["start"] + len(episode.dialogue.prefill_ids) :]
        return episode

    def goes_on_with(self, split: int, token: int) -> bool:
        """Whether a response of the finished episode would go on behind another token at ``split``: there is room, and it
        does not write the end."""
        (turn,) = (turn for turn in self.builder.turns if turn["start"] <= split < turn["end"])
        begun = [*self.builder.ids[turn["start"] : split], token]
        said = len(begun) - len(self.dialogue.prefill_ids)
        room = said < self.section.response_tokens and split + 1 < self.section.context_tokens
        return room and END_OF_RESPONSE not in decode(self.dialogue.tokenizer, begun).text

    def request(self) -> Request:
        """Ask for a response, or for the rest of it."""
        uniforms = self.draws.random(self.section.response_tokens)[len(self._begun) :]
        room = self.section.context_tokens - len(self.builder)
        forced = len(self.builder) - self._start
        return Request(self.builder.ids, uniforms[: max(1, room)], forced, self.spec.episode_id)

    def take(self, answer: Continuation) -> None:
        """Record a response, act on it and prepare the next turn."""
        prefill, begun = self.dialogue.prefill_ids, self._begun
        response = decode(self.dialogue.tokenizer, [*prefill, *begun, *answer.ids])
        ended = self._ended(answer)
        roles = token_roles(response, ended not in CUT)[len(prefill) :]
        self.builder.identity["policy_version"] = answer.policy_version
        self.builder.change_roles(roles[: len(begun)])  # what a response turns out to be decides on its beginning too
        self.builder.append_sampled(answer.ids, roles[len(begun) :], answer.logprob, answer.entropy)
        self._begun = []
        text = response.text
        if answer.finish == "eos":
            text = text[: response.spans[-1][0]]
        written = parse_response(text, self.section.actions_per_turn)
        with self.phases.phase("step"):
            state_key = self._state_key()
            actions = self._allowed(written)
            executed, reward, over = self._act(actions)
        action, valid = _storable("||".join(executed)), actions is not None
        self.builder.close_turn(self._start, reward, action, valid, state_key, written is not None, ended)
        if over:
            self._finish(_storable(outcome_of(self.environment)))
        elif self.turn == self.section.max_turns and not self.setup.closing:
            self._finish("turns")
        else:
            self._next_turn(reward, answer.finish == "eos")

    def _ended(self, answer: Continuation) -> str:
        """How a response that is about to be recorded ended, as ``Trajectories.turns`` has it."""
        if answer.finish in ("stop", "eos"):
            return answer.finish
        whole = len(self._begun) + len(answer.ids) >= self.section.response_tokens
        full = len(self.builder) + len(answer.ids) >= self.section.context_tokens
        return "context_tokens" if full and not whole else "response_tokens"

    def _allowed(self, actions: list[str] | None) -> list[str] | None:
        """Canonical actions, or None as soon as one is not allowed."""
        parsed = [parse_action(self.environment, action) for action in actions or []]
        return [p for p in parsed if p is not None] if parsed and None not in parsed else None

    def _act(self, actions: list[str] | None) -> tuple[list[str], float, bool]:
        """Execute a turn's actions, as far as those before leave them possible.

        Returns:
            Those executed, the turn's reward, and whether the environment's episode is over.
        """
        if actions is None:
            if not self.observation.startswith(INVALID):
                self.observation = f"{INVALID}\n{self.observation}"
            return [], self.section.format_penalty, False
        executed, total, over = list[str](), 0.0, False
        for action in actions:
            if over or (executed and parse_action(self.environment, action) is None):
                break
            try:
                self.observation, reward, over = step(self.environment, action)
            except UserError as error:
                raise UserError(f"{error} (in turn {self.turn} of episode {self.spec.episode_id})") from error.__cause__
            executed, total = [*executed, action], total + reward
        return executed, total, over

    def _expect(self, state_key: str) -> None:
        """Be where the parent was."""
        if self._state_key() != state_key:
            raise UserError(
                f"environments: {self.section.id!r} does not come to the same state by the same actions and seeds, so "
                "that no episode of it can be continued; its noise must come from the seed of reset alone"
            )

    def _next_turn(self, reward: float, ended_by_eos: bool) -> None:
        self.turn += 1
        left = actions_left_of(self.environment)
        following = self.dialogue.following(self.turn, self.observation, reward, ended_by_eos, left)
        full = len(self.builder) + len(following) + len(self.dialogue.prefill_ids) >= self.section.context_tokens
        reason = "turns" if self.turn > self.section.max_turns else "context" if full else None
        if reason is None or self.setup.closing:
            self.builder.append_text(following, Role.OBSERVATION)
            self._open_response()
        if reason is not None:
            self._finish(reason)

    def _open_response(self) -> None:
        """Force the prefill."""
        self._start = len(self.builder)
        self.builder.append_text(self.dialogue.prefill_ids, Role.THINK_TAG)

    def _finish(self, reason: str) -> None:
        self.done = True
        self.builder.finish(success_of(self.environment), reason)

    def _state_key(self) -> str:
        return _storable(text_of(self.environment, "state_key"))


def _storable(text: str) -> str:
    """Text as UTF-8 can hold it: lone surrogates are spelt out, so that what differs still does."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
