"""An engine that says what a script tells it, and lakes to play with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.environments import make
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.specs import EpisodeSpec, group_specs, iteration_specs
from pipeline.settings.params import Config, Environment, parse
from pipeline.trajectories.trajectory import Trajectories

NAME = "lake"


TOKENIZER = train_tokenizer(["player 0 1 goal 3 3 holes none", "let me think", "Left Right Up Down"] * 3, 320)


EOS = TOKENIZER.eos_token


Script = Callable[[str, int], str]
"""From an episode's id and its turn (from 0) to what is said."""


def config(
    rollout: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    methods: Sequence[str] = ("grpo",),
    **environment: Any,
) -> Config:
    lake = {"size": 3, "frozen": 0.7, "success_rate": 1.0, "max_actions": 6, "grid": "first", **(settings or {})}
    return parse(
        {
            "comparison": "test",
            "seeds": [0, 1],
            "environments": {
                NAME: {
                    "id": "actfocus/FrozenLake-v1",
                    "settings": lake,
                    "max_turns": 4,
                    "response_tokens": 24,
                    "context_tokens": 400,
                    **environment,
                }
            },
            "policy": {"kind": "pretrained", "model": "unused"},
            "rollout": {"groups": 2, "group_size": 3, "batch_episodes": 6, **(rollout or {})},
            "train": {"minibatch": 3},
            "method_defaults": {
                "filter": {"kind": "all"},
                "advantage": {"kind": "group"},
                "weight": {"kind": "uniform"},
                "reward": {"kind": "none"},
                "aggregation": {"kind": "weight_sum"},
                "surrogate": {"kind": "ppo_clip"},
                "regulariser": {"kind": "fixed"},
                "learning_rate": 1e-4,
            },
            "methods": {name: {} for name in methods},
        }
    )


class ScriptedEngine:
    """A ``RolloutEngine`` that says what a script tells it, within its draws, and remembers what it was asked.

    The log-probability of a token is minus its draw, so that draws can be read off the record.

    Args:
        script: what to say.
        keys: the episodes' ids, in order; the script and the record go by them.
        at_once: episodes that are open at once, each of which gets one answer per round.
    """

    policy_version = 7

    def __init__(self, script: Script, keys: Sequence[str], at_once: int = 6) -> None:
        self.script, self.keys, self.at_once = script, keys, at_once
        self.asked: dict[str, list[Request]] = {}
        self.answers: dict[str, list[Continuation]] = {}
        self.samplings: set[Sampling] = set()
        self.most_open = self.forgotten = 0

    @property
    def requests(self) -> list[Request]:
        return [request for asked in self.asked.values() for request in asked]

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        self.samplings.add(sampling)
        waiting, last = enumerate(requests), dict[int, Continuation]()
        current: dict[int, Request] = {}
        while True:
            current |= itertools.islice(waiting, self.at_once - len(current))
            if not current:
                return [last[number] for number in sorted(last)]
            self.most_open = max(self.most_open, len(current))
            for number, request in list(current.items()):
                last[number] = self._say(self.keys[number], request, sampling)
                following = follow(number, last[number]) if follow else None
                if following is None:
                    del current[number]
                else:
                    current[number] = following

    def forget(self) -> None:
        self.forgotten += 1

    def sync(self, policy: Policy, version: int) -> None:
        self.policy_version = version

    def _say(self, key: str, request: Request, sampling: Sampling) -> Continuation:
        turn = len(self.answers.get(key, []))
        self.asked.setdefault(key, []).append(Request(list(request.ids), request.uniforms, request.forced))
        ids = TOKENIZER(self.script(key, turn), add_special_tokens=False)["input_ids"][: len(request.uniforms)]
        text = TOKENIZER.decode(ids)
        finish = "eos" if text.endswith(EOS) else "stop" if sampling.stop in text else "length"
        draws = request.uniforms[: len(ids)].tolist()
        answer = Continuation(ids, [-u for u in draws], [u / 2 for u in draws], finish, self.policy_version)
        self.answers.setdefault(key, []).append(answer)
        return answer


def says(action: str) -> str:
    return f"<think>so</think><answer>{action}</answer>"


def always(text: str) -> Script:
    return lambda key, turn: text


def play(
    settings: Config, script: Script, specs: Sequence[EpisodeSpec] | None = None, closing: bool = False
) -> tuple[Trajectories, ScriptedEngine]:
    chosen = iteration_specs(settings, NAME, 0, 0) if specs is None else specs
    engine = ScriptedEngine(script, [spec.episode_id for spec in chosen])
    return collect(engine, TOKENIZER, settings, NAME, chosen, 1.0, closing=closing), engine


def episode_turns(made: Trajectories, episode: int) -> list[dict[str, Any]]:
    return [
        {key: values[turn] for key, values in made.turns.items()}
        for turn in range(made.turn_offsets[episode], made.turn_offsets[episode + 1])
    ]


def episode_text(made: Trajectories, episode: int) -> str:
    return str(TOKENIZER.decode(made.input_ids[made.offsets[episode] : made.offsets[episode + 1]]))


def lake_at(section: Environment, state_seed: int) -> Any:
    environment = make(section)
    environment.reset(seed=0, options={"state_seed": state_seed})
    return environment


def specs_of(settings: Config, states: Sequence[int]) -> list[EpisodeSpec]:
    return group_specs(NAME, states, settings.rollout.group_size, 0, 0, "train")
