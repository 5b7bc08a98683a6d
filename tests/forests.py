"""What tests of branching share: settings of every growth, an engine that chatters, and forests without a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.model.policy import Policy
from pipeline.rollout.candidates import Likeliest
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.episode import Setup
from pipeline.rollout.forest import Forest
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.settings.branching import EntropyRise, Positions, TemperatureShift, TreeSearch
from pipeline.settings.params import Config
from pipeline.settings.section import Section
from pipeline.trajectories.trajectory import Trajectories, concatenate
from tests.scripted import EOS
from tests.test_collector import NAME, TOKENIZER, config, says
from tests.test_engine import one_by_one

PHRASES = [
    TOKENIZER(text, add_special_tokens=False)["input_ids"]
    for text in (
        *(says(move) for move in ("Up", "Left", "Down", "Right", "Fly")),
        "<think>so let me think</think><answer>Down</answer>",
        f"so{EOS}",
        f"<think>so</think><answer>Up{EOS}",
        "so let me think and think and think",
    )
]


def positions_section(**changes: Any) -> Positions:
    return Positions(kind="positions", **{"signal": "entropy", **changes})


def rise_section(**changes: Any) -> EntropyRise:
    return EntropyRise(kind="entropy_rise", **changes)


def search_section(width: int, **changes: Any) -> TreeSearch:
    return TreeSearch(kind="tree_search", width=width, **changes)


def shift_section(share: float, **changes: Any) -> TemperatureShift:
    return TemperatureShift(kind="temperature_shift", share=share, **changes)


class Chatter:
    """A ``RolloutEngine`` that says phrases, token by token: a draw chooses among the tokens that go on with one of them.

    Entropies are draws too, so that any order of them comes up.
    """

    policy_version = 3

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        return one_by_one(self._say, requests, follow)

    def forget(self) -> None: ...

    def sync(self, policy: Policy, version: int) -> None: ...

    def _say(self, request: Request) -> Continuation:
        answer, ids = Continuation([], [], [], "length", self.policy_version), list(request.ids)
        begun = ids[len(ids) - request.forced :]
        for draw in request.uniforms:
            said = [*begun, *answer.ids]
            following = sorted({own[len(said)] for own in PHRASES if own[: len(said)] == said})
            answer.ids.append(following[int(draw * len(following))])
            answer.logprob.append(-math.log(len(following)))
            answer.entropy.append(float(draw * 7919 % 1))
            if [*begun, *answer.ids] in PHRASES:
                finish = "eos" if answer.ids[-1] == TOKENIZER.eos_token_id else "stop"
                return Continuation(answer.ids, answer.logprob, answer.entropy, finish, self.policy_version)
        return answer


def lake(groups: int = 2, group_size: int = 6, **environment: Any) -> Config:
    """A slippery lake, with room for some responses and not for others."""
    changes = {"response_tokens": 18, "context_tokens": 300, "format_penalty": -0.1, **environment}
    slippery = {"success_rate": 0.6, "frozen": 0.9, "size": 4, "least_distance": 3}
    return config({"groups": groups, "group_size": group_size}, slippery, **changes)


def phrases(wave: Trajectories) -> Likeliest:
    """In place of each token up to four that a ``Chatter`` may say there and go on behind; else the one that stands there."""
    tokens = np.zeros((len(wave.input_ids), 4), dtype=np.int32)
    for row, base in zip(rows(wave), wave.offsets, strict=False):
        for turn in row["turns"]:
            for place in range(turn["start"], turn["end"]):
                said = row["input_ids"][turn["start"] : place].tolist()
                more = [own for own in PHRASES if own[: len(said)] == said and len(own) > len(said) + 1]
                found = sorted({own[len(said)] for own in more})
                tokens[base + place] = [*found, *[row["input_ids"][place]] * 4][:4]
    return Likeliest(tokens, np.full(tokens.shape, -1.5, dtype=np.float32))


def grow(
    forest: Forest, score: Callable[[Trajectories], np.ndarray] = lambda wave: wave.entropy.astype(np.float64)
) -> Iterator[Trajectories]:
    """All waves; ``score`` is what ``positions`` gets."""
    for number in itertools.count():
        if (wave := forest.wave()) is None:
            return
        yield wave
        if number == 0:
            forest.score(wave, score(wave), phrases(wave) if isinstance(forest.engine, Chatter) else None)


def in_order(forest: Forest, waves: Iterable[Trajectories]) -> Trajectories:
    table = concatenate(list(waves))
    place = {name: index for index, name in enumerate(table.episodes["episode_id"])}
    return table.select([place[episode.spec.episode_id] for tree in forest.trees for episode in tree.episodes])


def planted(
    changed: Config,
    section: Section,
    engine: Any = None,
    tokenizer: Any = TOKENIZER,
    specs: Sequence[EpisodeSpec] | None = None,
    **score: Any,
) -> Trajectories:
    """The forest of an iteration, grown."""
    chosen = iteration_specs(changed, NAME, 0, 0) if specs is None else specs
    setup = Setup(tokenizer, changed, NAME)
    forest = Forest(engine or Chatter(), setup, chosen, section, changed.rollout.temperature)
    return in_order(forest, grow(forest, **score))


def rows(table: Trajectories) -> list[dict[str, Any]]:
    """Each episode's columns, turns and tokens apart from the others'."""
    made = []
    for e in range(len(table)):
        tokens = slice(table.offsets[e], table.offsets[e + 1])
        turns = range(table.turn_offsets[e], table.turn_offsets[e + 1])
        made.append(
            {name: column[e] for name, column in table.episodes.items()}
            | {name: getattr(table, name)[tokens] for name in ("input_ids", "role", "sampled", "logprob", "entropy")}
            | {"turns": [{name: column[turn] for name, column in table.turns.items()} for turn in turns]}
            | {"trainable": table.trainable[tokens]}
        )
    return made
