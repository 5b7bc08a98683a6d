"""Episodes on the real FrozenLake, spoken by an engine with a script, and by the transformers engine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.supervision import _encode, demonstrate
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.commands.play import show
from pipeline.environments import initial_states, make, split_of
from pipeline.environments.frozen_lake import MOVES, FrozenLakeExpert
from pipeline.environments.splits import SPLITS
from pipeline.evaluation.evaluate import episode_results, summary
from pipeline.model.policy import Policy
from pipeline.objective.batch import token_batch
from pipeline.objective.weights import actfocus_weights
from pipeline.progress.timing import Phases
from pipeline.rollout import collector
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.specs import EpisodeSpec, group_specs, iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config, Environment, Phase, parse
from pipeline.settings.weight import ActFocusWeight
from pipeline.trajectories.parsing import END_OF_RESPONSE
from pipeline.trajectories.prompting import INVALID, Dialogue
from pipeline.trajectories.records import episode_records
from pipeline.trajectories.table import read, to_table, write
from pipeline.trajectories.trajectory import RESPONSE_ROLES, RESPONSES, Role, Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.randomness import generator
from pipeline.workspace.yaml_files import read_yaml

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


def wander(key: str, turn: int) -> str:
    """Each member of a group goes another way."""
    return says(list(MOVES)[(int(key[-1]) + turn) % 4])


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


def way_to_goal(section: Environment, state_seed: int) -> list[str]:
    lake, draws, way = lake_at(section, state_seed), np.random.default_rng(0), []
    while not lake.success:
        way.append(FrozenLakeExpert().act(lake, draws))
        lake.step(way[-1])
    return way


def beside_a_hole(section: Environment) -> tuple[int, str]:
    """A state whose start is next to a hole, and the move into it."""
    for state_seed in range(200):
        lake = lake_at(section, state_seed)
        for move, (down, right) in MOVES.items():
            if (lake.player[0] + down, lake.player[1] + right) in lake.holes:
                return state_seed, move
    raise AssertionError("no such lake")


def specs_of(settings: Config, states: Sequence[int]) -> list[EpisodeSpec]:
    return group_specs(NAME, states, settings.rollout.group_size, 0, 0, "train")


# ---------------------------------------------------------------------------------------- token in, token out


@pytest.mark.parametrize("layout", ["compact", "published"])
@pytest.mark.parametrize("prefill", ["", "<think>"])
def test_recorded_tokens_are_exactly_those_sent_and_returned(layout: str, prefill: str) -> None:
    settings = config({"prefill": prefill}, layout=layout, context_tokens=4000)
    made, engine = play(settings, always(says("Up").removeprefix(prefill)))
    for episode, key in enumerate(made.episodes["episode_id"]):
        ids = made.input_ids[made.offsets[episode] : made.offsets[episode + 1]].tolist()
        sampled = made.sampled[made.offsets[episode] : made.offsets[episode + 1]]
        asked, said = engine.asked[key], engine.answers[key]
        for request, answer, turn in zip(asked, said, episode_turns(made, episode), strict=True):
            start = len(request.ids)
            assert ids[:start] == request.ids
            assert ids[start : turn["end"]] == answer.ids
            assert turn["start"] == start - request.forced
            assert sampled[start : turn["end"]].all()
        assert sampled.sum() == sum(len(answer.ids) for answer in said)
        span = slice(made.offsets[episode], made.offsets[episode + 1])
        for column in ("logprob", "entropy"):
            expected = np.array([x for answer in said for x in getattr(answer, column)], dtype=np.float32)
            np.testing.assert_array_equal(getattr(made, column)[span][sampled], expected)
    assert set(made.episodes["policy_version"]) == {7}
    assert engine.samplings == {Sampling(1.0, END_OF_RESPONSE)}


def test_text_is_what_the_dialogue_renders() -> None:
    settings = config(settings={"grid": "never"})
    state = initial_states(make(settings.environments[NAME]), "train", 1, generator(0, "any"))[0]
    made, _ = play(settings, always(says("Up")), specs_of(settings, [state]))
    lake = lake_at(settings.environments[NAME], state)
    expected = ""
    for turn in range(4):
        expected += f"<|user|>{lake._observe(first=False)}<|assistant|>{says('Up')}"
        if turn < 3:
            lake.step("Up")
        if lake.done:
            break
    assert episode_text(made, 0) == expected


def test_prefill_is_recorded_as_not_sampled() -> None:
    made, engine = play(config({"prefill": "<think>"}), always("so</think><answer>Up</answer>"))
    (tag,) = TOKENIZER("<think>", add_special_tokens=False)["input_ids"]
    assert {request.forced for request in engine.requests} == {1}
    for episode in range(len(made)):
        for turn in episode_turns(made, episode):
            token = made.offsets[episode] + turn["start"]
            assert made.input_ids[token] == tag
            assert made.role[token] == Role.THINK_TAG
            assert not made.sampled[token]
            assert made.logprob[token] == 0
            assert turn["valid"]
            inside = made.role[token + 1 : made.offsets[episode] + turn["end"]].tolist()
            expected = [Role.REASONING, Role.THINK_TAG, Role.ANSWER_TAG, Role.ACTION, Role.ANSWER_TAG]
            assert [r for i, r in enumerate(inside) if i == 0 or inside[i - 1] != r] == expected
    outside = made.role[~made.sampled].tolist()
    assert set(outside) == {Role.PROMPT, Role.OBSERVATION, Role.THINK_TAG}
    assert set(made.role[made.sampled].tolist()) <= set(RESPONSE_ROLES)


def test_members_of_a_group_share_the_prompt_and_not_the_draws() -> None:
    made, engine = play(config(), always(says("Up")))
    groups: dict[int, list[int]] = {}
    for episode, group in enumerate(made.groups.tolist()):
        groups.setdefault(group, []).append(episode)
    assert [len(members) for members in groups.values()] == [3, 3]
    seen: set[bytes] = set()
    for members in groups.values():
        keys = [made.episodes["episode_id"][member] for member in members]
        assert len({tuple(engine.asked[key][0].ids) for key in keys}) == 1
        assert len({made.episodes["state_key"][member] for member in members}) == 1
        assert (made.role[made.offsets[members[0]]] == Role.PROMPT).all()
    for request in engine.requests:
        seen.add(request.uniforms.tobytes())
    assert len(seen) == len(engine.requests)


def test_group_with_different_prompts_is_refused() -> None:
    settings = config()
    one, two = initial_states(make(settings.environments[NAME]), "train", 2, generator(0, "any"), distinct=True)
    specs = [EpisodeSpec(str(i), "same", state, 0, 0, 0, (0, "t", i)) for i, state in enumerate((one, two))]
    with pytest.raises(UserError, match="with different prompts"):
        play(settings, always(says("Up")), specs)


# ------------------------------------------------------------------------------------------------- what happens


def test_reaching_the_goal() -> None:
    settings = config(max_turns=6)
    states = initial_states(make(settings.environments[NAME]), "train", 2, generator(0, "any"))
    specs = specs_of(settings, states)
    ways = {spec.episode_id: way_to_goal(settings.environments[NAME], spec.state_seed) for spec in specs}
    made, _ = play(settings, lambda key, turn: says(ways[key][turn]), specs)
    assert set(made.episodes["end_reason"]) == {"goal"}
    assert all(made.episodes["success"])
    assert made.returns.tolist() == [1.0] * len(specs)
    for episode, spec in enumerate(specs):
        turns = episode_turns(made, episode)
        assert [turn["action"] for turn in turns] == ways[spec.episode_id]
        assert [turn["reward"] for turn in turns] == [0.0] * (len(turns) - 1) + [1.0]
        lake = lake_at(settings.environments[NAME], spec.state_seed)
        for turn in turns:
            assert turn["state_key"] == lake.state_key
            lake.step(turn["action"])
        assert made.episodes["state_key"][episode] == turns[0]["state_key"]
        assert made.episodes["environment"][episode] == "actfocus/FrozenLake-v1"


def test_falling_into_a_hole() -> None:
    settings = config()
    state, move = beside_a_hole(settings.environments[NAME])
    made, _ = play(settings, always(says(move)), specs_of(settings, [state]))
    assert set(made.episodes["end_reason"]) == {"failed"}
    assert not any(made.episodes["success"])
    assert (np.diff(made.turn_offsets) == 1).all()
    assert made.returns.tolist() == [0.0] * 3


def test_running_out_of_actions_is_a_failure_and_out_of_turns_is_not() -> None:
    for max_turns, reason in ((4, "failed"), (2, "turns")):
        settings = config(settings={"max_actions": 3, "frozen": 1.0, "least_distance": 2}, max_turns=max_turns)
        state = next(s for s in range(200) if lake_at(settings.environments[NAME], s).player == (0, 0))
        made, _ = play(settings, always(says("Up")), specs_of(settings, [state]))
        assert set(made.episodes["end_reason"]) == {reason}
        assert (np.diff(made.turn_offsets) == min(max_turns, 3)).all()


@pytest.mark.parametrize(
    "text",
    [
        "Up",
        "<answer>Up</answer>",
        says("Fly"),
        says(""),
        says("Up||Fly"),
        "<think>so</think><answer>Up",
        says("Up") + "!",
    ],
)
def test_malformed_response_costs_the_penalty_and_leaves_the_state(text: str) -> None:
    settings = config(format_penalty=-0.25, actions_per_turn=2, max_turns=3)
    made, _ = play(settings, always(text))
    assert set(made.episodes["end_reason"]) == {"turns"}
    assert set(made.turns["reward"]) == {-0.25}
    assert not any(made.turns["valid"])
    assert set(made.turns["action"]) == {""}
    assert made.returns.tolist() == [-0.75] * 6
    for episode in range(6):
        assert len({turn["state_key"] for turn in episode_turns(made, episode)}) == 1
        messages = episode_text(made, episode).split("<|user|>")[1:]
        opening = messages[0].split("<|assistant|>")[0]
        for message in messages[1:]:
            assert message.split("<|assistant|>")[0] == f"{INVALID}\n{opening}"


def test_a_valid_response_clears_the_complaint() -> None:
    settings = config(settings={"frozen": 1.0})
    state = next(s for s in range(200) if lake_at(settings.environments[NAME], s).player == (0, 0))
    specs = specs_of(settings, [state])
    made, _ = play(settings, lambda key, turn: "what" if turn in (0, 2) else says("Up"), specs)
    assert [turn["valid"] for turn in episode_turns(made, 0)] == [False, True, False, True]
    complaints = [INVALID in message for message in episode_text(made, 0).split("<|user|>")[1:]]
    assert complaints == [False, True, False, True]


def test_reward_of_every_turn_stands_on_its_last_token() -> None:
    made, _ = play(config(format_penalty=-0.1), always("what"))
    rewards = made.token_rewards()
    ends = [made.offsets[e] + turn["end"] - 1 for e in range(len(made)) for turn in episode_turns(made, e)]
    assert np.flatnonzero(rewards).tolist() == ends


def test_no_more_actions_are_executed_than_a_turn_allows() -> None:
    for limit, executed in ((1, "Up"), (2, "Up||Left"), (3, "Up||Left||Down")):
        settings = config(settings={"frozen": 1.0}, actions_per_turn=limit, max_turns=1, response_tokens=40)
        state = next(s for s in range(200) if lake_at(settings.environments[NAME], s).player == (0, 0))
        made, _ = play(settings, always(says("up || LEFT||Down||Down")), specs_of(settings, [state]))
        assert set(made.turns["action"]) == {executed}


def test_actions_after_the_end_of_the_episode_are_not_executed() -> None:
    settings = config(actions_per_turn=3)
    state, move = beside_a_hole(settings.environments[NAME])
    made, _ = play(settings, always(says(f"{move}||{move}")), specs_of(settings, [state]))
    assert set(made.episodes["end_reason"]) == {"failed"}
    assert (np.diff(made.turn_offsets) == 1).all()


def test_a_turn_that_another_end_token_has_ended_gets_no_second_end() -> None:
    """Generation settings may name several; the tokenizer knows one."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + m.content + '<|end|>' if m.role == 'assistant' else '<|user|>' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    settings, other = config(), "<|assistant|>"
    for said, finish in ((says("Up") + EOS, "eos"), (says("Up") + other, "eos"), (says("Up"), "stop")):
        episode = Setup(tokenizer, settings, NAME).begin(specs_of(settings, [0])[0])
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        episode.take(Continuation(ids, [0.0] * len(ids), [0.0] * len(ids), finish, 0))
        text = tokenizer.decode(episode.builder.ids)
        assert text.count(EOS) + text.count(other) == 1
        assert text.split(says("Up"))[1].startswith(f"{other if other in said else EOS}<|user|>")


def test_end_of_sequence_is_recorded_and_is_no_part_of_the_answer() -> None:
    for text, valid in ((says("Up") + EOS, True), (f"<think>so</think><answer>Up{EOS}", False), (EOS, False)):
        made, _ = play(config(settings={"frozen": 1.0, "least_distance": 3}, max_turns=2), always(text))
        assert set(made.turns["valid"]) == {valid}
        assert (np.diff(made.turn_offsets) == 2).all()
        for episode in range(len(made)):
            for turn in episode_turns(made, episode):
                last = made.offsets[episode] + turn["end"] - 1
                assert made.input_ids[last] == TOKENIZER.eos_token_id
                assert made.sampled[last]
            assert episode_text(made, episode).count(EOS) == 2


THOUGHTS = " so" * 40
"""More than a response may hold."""
WRITTEN = {
    says("Up"): ("valid", "stop"),
    says("Up") + EOS: ("valid", "eos"),
    says("Fly"): ("disallowed", "stop"),
    says("Up||Fly") + EOS: ("disallowed", "eos"),
    says(""): ("malformed", "stop"),
    f"<think>so{EOS}": ("malformed", "eos"),
    "<think>so</answer>": ("malformed", "stop"),
    f"<think>so</think>{EOS}": ("malformed", "eos"),
    f"<think>{THOUGHTS}": ("cut", "response_tokens"),
    f"<think>so</think><answer>{THOUGHTS}": ("cut", "response_tokens"),
    THOUGHTS: ("cut", "response_tokens"),
}
"""What is said, and what it is counted as and how it ended."""


def count_of(results: pa.Table) -> dict[str, int]:
    return {kind: sum(results[f"{kind}_turns"].to_pylist()) for kind in RESPONSES}


@pytest.mark.parametrize("prefill", ["", "<think>"])
@pytest.mark.parametrize("text", WRITTEN)
def test_what_a_response_was_and_how_it_ended_is_recorded_and_counted(text: str, prefill: str) -> None:
    kind, ended = WRITTEN[text]
    settings = config({"prefill": prefill}, {"frozen": 1.0, "least_distance": 3}, max_turns=2, actions_per_turn=2)
    said = text.removeprefix(prefill) if text.startswith("<think>") else text
    made, _ = play(settings, always(said))
    assert set(made.turns["ended"]) == {ended}
    assert set(made.responses) == {kind}
    counts = dict.fromkeys(RESPONSES, 0) | {kind: 12}
    assert count_of(episode_results(made)) == counts
    rates = summary(made)
    assert [rates[f"{name}_rate"] for name in RESPONSES[1:]] == [counts[name] / 12 for name in RESPONSES[1:]]
    assert rates["valid_action_rate"] == counts["valid"] / 12
    (record,) = episode_records(made.select([0]), TOKENIZER)
    assert {(turn["response"], turn["ended"]) for turn in record["turns"]} == {(kind, ended)}


@pytest.mark.parametrize(
    ("text", "weight"),
    [(f"<think>so{EOS}", 1.0), ("<think>so</answer>", 1.0), (f"<think>{THOUGHTS}", 0.1), ("<think>so</think>", 0.1)],
)
def test_thoughts_that_are_cut_weigh_like_reasoning_and_those_that_end_unclosed_like_malformed_text(
    text: str, weight: float
) -> None:
    """As params.yaml has it: reasoning 0.1, malformed text 1."""
    made, _ = play(config(max_turns=1), always(text))
    nothing = np.zeros(len(made.input_ids), dtype=np.float32)
    batch = token_batch(
        replace(made, energy=nothing, ref_logprob=nothing, ref_entropy=nothing), generator(0, "t"), 0, 1
    )
    settings = read_yaml(Path(__file__).parents[1] / "params.yaml")["methods"]["grpo_actfocus"]["weight"]
    weights = actfocus_weights(batch, ActFocusWeight(**settings))
    first = int(np.flatnonzero(made.sampled)[0])
    assert made.role[first] == Role.THINK_TAG
    thought = TOKENIZER(text, add_special_tokens=False)["input_ids"][1]
    assert made.input_ids[first + 1] == thought
    assert float(weights[first + 1]) == pytest.approx(weight)


def test_play_says_of_a_turn_without_an_action_what_its_response_was(capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(settings={"frozen": 1.0, "least_distance": 3}, max_turns=4)
    said = [f"<think>{THOUGHTS}", "<think>so</answer>", says("Fly"), says("Up")]
    made, _ = play(settings, lambda key, turn: said[turn])
    show(replace(made.select([0]), energy=np.zeros(len(made.input_ids))), TOKENIZER)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("reward")]
    words = ["(cut by response_tokens)", "(malformed)", "(disallowed)"]
    assert printed == [*(f"reward -0.1 {word}" for word in words), "reward 0"]


def test_a_response_without_room_is_cut_by_the_context_and_one_that_fills_both_by_its_own_limit() -> None:
    settings = config(max_turns=1)
    specs = specs_of(settings, [1])
    prompt = play(settings, always(THOUGHTS), specs)[0].turns["start"][0]
    for room, ended in (
        (24, "response_tokens"),
        (25, "response_tokens"),
        (23, "context_tokens"),
        (1, "context_tokens"),
    ):
        made, _ = play(config(max_turns=1, context_tokens=prompt + room), always(THOUGHTS), specs)
        assert set(made.turns["ended"]) == {ended}
        assert set(made.responses) == {"cut"}


@pytest.mark.parametrize("prefill", ["", "<think>"])
@pytest.mark.parametrize("reason", ["turns", "context", "failed"])
def test_a_closing_episode_that_is_cut_off_ends_where_its_next_response_would_begin(reason: str, prefill: str) -> None:
    """And is else what it is without: the rest is what a longer episode goes on with, and nothing behind a true end."""
    lake, opened = {"max_actions": 4, "frozen": 1.0, "least_distance": 2}, len(TOKENIZER(prefill)["input_ids"])
    script = always(says("Up").removeprefix(prefill))
    longer = config({"prefill": prefill}, lake, max_turns=9)
    state = next(s for s in range(200) if lake_at(longer.environments[NAME], s).player == (0, 0))
    specs = specs_of(longer, [state])
    whole, _ = play(longer, script, specs)
    third = int(whole.turns["start"][2]) + opened
    limits = {"turns": {"max_turns": 2}, "context": {"context_tokens": third}, "failed": {}}
    settings = config({"prefill": prefill}, lake, **{"max_turns": 9, **limits[reason]})
    plain, _ = play(settings, script, specs)
    closing, _ = play(settings, script, specs, closing=True)
    assert set(closing.episodes["end_reason"]) == {reason}
    assert (closing.episodes, closing.turns) == (plain.episodes, plain.turns)
    for e in range(len(plain)):
        one, other, full = (made.input_ids[made.offsets[e] : made.offsets[e + 1]] for made in (plain, closing, whole))
        assert other.tolist() == (one if reason == "failed" else full[:third]).tolist()
        assert len(other) > len(one) or reason == "failed"
        assert not closing.sampled[closing.offsets[e] + len(one) : closing.offsets[e + 1]].any()


@pytest.mark.parametrize("prefill", ["", "<think>"])
def test_context_limit_ends_the_episode_and_is_never_exceeded(prefill: str) -> None:
    """At every limit, an episode is the unlimited one cut short, and it always ends with something sampled."""

    def limited(tokens: int) -> tuple[Trajectories, ScriptedEngine]:
        lake = {"frozen": 1.0}
        return play(config({"prefill": prefill}, lake, max_turns=50, context_tokens=tokens), always("what"))

    unlimited, _ = limited(2000)
    for limit in range(70, 130):
        made, engine = limited(limit)
        assert set(made.episodes["end_reason"]) == {"context"}
        for request in engine.requests:
            assert 0 < len(request.uniforms) <= limit - len(request.ids)
        for episode in range(len(made)):
            start, end = made.offsets[episode], made.offsets[episode + 1]
            assert end - start <= limit
            whole = unlimited.input_ids[unlimited.offsets[episode] :]
            np.testing.assert_array_equal(made.input_ids[start:end], whole[: end - start])
            assert made.sampled[end - 1]


# ------------------------------------------------------------------------------------------ names and determinism


def spec_fields(specs: Sequence[EpisodeSpec]) -> list[tuple[Any, ...]]:
    return [(s.episode_id, s.group_id, s.state_seed, s.seed, s.iteration, s.noise, s.draws) for s in specs]


def test_specs_depend_on_environment_seed_and_iteration_alone() -> None:
    one = config(methods=("grpo",))
    other = config({"prefill": "<think>", "temperature": 0.5, "batch_episodes": 1}, methods=("a", "b", "grpo"))
    assert spec_fields(iteration_specs(one, NAME, 0, 0)) == spec_fields(iteration_specs(other, NAME, 0, 0))
    variants = [spec_fields(iteration_specs(one, NAME, seed, it)) for seed, it in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for column in (0, 1, 5, 6):
        values = [str(spec[column]) for variant in variants for spec in variant]
        assert len(set(values)) == len(values) // (3 if column == 1 else 1)
    assert len({tuple(spec[2] for spec in variant) for variant in variants}) == 4


def test_members_of_a_group_share_the_state_and_not_the_noise() -> None:
    specs = iteration_specs(config(), NAME, 0, 0)
    assert len(specs) == 6
    for members in (specs[:3], specs[3:]):
        assert len({spec.state_seed for spec in members}) == len({spec.group_id for spec in members}) == 1
        assert len({spec.noise for spec in members}) == 3


def test_equal_specs_give_equal_bytes(tmp_path: Path) -> None:
    settings = config(settings={"success_rate": 0.5})
    contents = []
    for name in ("one", "two"):
        made, _ = play(settings, wander)
        write(made, tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_number_of_episodes_at_once_changes_nothing() -> None:
    settings, tables = config(settings={"success_rate": 0.5}), []
    specs = iteration_specs(settings, NAME, 0, 0)
    for at_once in (6, 4, 1):
        engine = ScriptedEngine(wander, [spec.episode_id for spec in specs], at_once)
        tables.append(to_table(collect(engine, TOKENIZER, settings, NAME, specs, 1.0)))
        assert engine.most_open == at_once
        assert engine.forgotten == 1
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_the_environment_is_timed_apart() -> None:
    settings, phases = config(), Phases()
    specs = iteration_specs(settings, NAME, 0, 0)
    engine = ScriptedEngine(wander, [spec.episode_id for spec in specs])
    with phases.phase("collect"):
        collect(engine, TOKENIZER, settings, NAME, specs, 1.0, phases=phases)
    taken = phases.take()
    assert set(taken) == {"collect", "reset", "step"}
    assert min(taken.values()) > 0


def test_an_episode_begins_when_there_is_room_for_it() -> None:
    settings, begun = config(), list[Episode]()
    specs, setup = iteration_specs(settings, NAME, 0, 0), Setup(TOKENIZER, settings, NAME)

    def episodes() -> Iterator[Episode]:
        for spec in specs:
            assert sum(not episode.done for episode in begun) < 2
            begun.append(setup.begin(spec))
            yield begun[-1]

    engine = ScriptedEngine(wander, [spec.episode_id for spec in specs], 2)
    assert collector.play(engine, episodes(), 1.0) == begun
    assert len(begun) == len(specs)


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=32,
            eos_token_id=TOKENIZER.eos_token_id,
            tie_word_embeddings=True,
            **shape,
        )
    )
    return Policy(model.eval(), TOKENIZER)


def test_a_real_policy_is_recorded_with_the_log_probabilities_of_its_tokens(policy: Policy, tmp_path: Path) -> None:
    """Twice the same bytes; every sampled token scored as by one plain pass over the stored ids."""
    settings = config({"prefill": "<think>", "batch_episodes": 4, "temperature": 0.8})
    for name in ("one", "two"):
        specs = iteration_specs(settings, NAME, 0, 0)
        made = collect(TransformersEngine(policy, 4, policy_version=3), TOKENIZER, settings, NAME, specs, 0.8)
        write(made, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert set(made.episodes["policy_version"]) == {3}
    assert made.lengths.min() > 2 * 24
    for episode in range(len(made)):
        span = slice(made.offsets[episode], made.offsets[episode + 1])
        ids = torch.from_numpy(made.input_ids[span].astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0, :-1].double() / 0.8, -1)
        chosen = logprobs.gather(-1, ids[1:, None])[:, 0].numpy()
        entropy = -(logprobs.exp() * logprobs).sum(-1).numpy()
        sampled = made.sampled[span][1:]
        np.testing.assert_allclose(made.logprob[span][1:][sampled], chosen[sampled], atol=1e-4)
        np.testing.assert_allclose(made.entropy[span][1:][sampled], entropy[sampled], atol=1e-4)


def test_prompt_is_the_dialogues_opening() -> None:
    settings = config(layout="published", context_tokens=4000)
    made, _ = play(settings, always(says("Up")))
    section = settings.environments[NAME]
    dialogue = Dialogue(TOKENIZER, "published", "", section.response_tokens)
    for episode, spec in enumerate(iteration_specs(settings, NAME, 0, 0)):
        lake = lake_at(section, spec.state_seed)
        expected = dialogue.opening(lake.instructions, lake._observe(first=True), lake.max_actions)
        span = made.role[made.offsets[episode] : made.offsets[episode + 1]] == Role.PROMPT
        ids = made.input_ids[made.offsets[episode] : made.offsets[episode + 1]]
        assert ids[span].tolist() == expected
        assert span[: len(expected)].all()


# --------------------------------------------------------------------------------- environments that are not to be trusted


class Odd(gymnasium.Env[str, str]):
    """An endless corridor with a door in it. Settings take the place of whatever it has."""

    observation_space = action_space = gymnasium.spaces.Text(max_length=100)
    instructions, observation, success = "Go on.", "here", False

    def __init__(self, **parts: Any) -> None:
        self.open, self.state_key = False, ""
        self.__dict__ |= parts

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.open = False
        self.state_key = self.state_key or f"state {(options or {}).get('state_seed', seed)}"
        return self.observation, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.open = not self.open
        return self.observation, 0.5, False, False, {}

    def parse_action(self, text: str) -> str | None:
        return text if text == ("enter" if self.open else "open") else None


class OddExpert:
    def act(self, environment: Odd, draws: np.random.Generator) -> str:
        return "enter" if environment.open else "open"

    def random_action(self, environment: Odd, draws: np.random.Generator) -> str:
        return self.act(environment, draws)

    def reason(self, environment: Odd, words: int, draws: np.random.Generator) -> str:
        return " ".join(["so"] * words)


gymnasium.register(id="Odd-v0", entry_point=Odd, disable_env_checker=True)
ODD = f"{__name__}:Odd-v0"
PHASE = Phase(steps=1, reasoning_words=(0, 3), action_noise=0.5)


def odd(settings: dict[str, Any], **environment: Any) -> Config:
    made = config(**{"layout": "published", "context_tokens": 9000, **environment})
    section = made.environments[NAME].model_copy(update={"id": ODD, "settings": settings})
    return made.model_copy(update={"environments": {NAME: section}})


def play_odd(settings: dict[str, Any], text: str = says("open"), **environment: Any) -> Trajectories:
    made = odd(settings, **environment)
    return play(made, always(text), group_specs(NAME, [1, 2], 2, 0, 0, "train"))[0]


def raises(*_: Any, **__: Any) -> Any:
    raise KeyError("no\nsuch door")


STEP, RAISED = "step('open')", r"KeyError: 'no\nsuch door' (test_collector.py, line "


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reset": lambda **_: "here"}, " returned a str from reset; it must be (observation, information)"),
        ({"observation": 7}, " returned an observation of type int from reset; it must be text"),
        ({"reset": raises}, f": reset raised {RAISED}"),
        ({"instructions": None}, " returned a value of type NoneType from instructions; it must be text"),
        ({"step": raises}, f": {STEP} raised {RAISED}"),
        (
            {"step": lambda _: ("", 0.0, False, {})},
            f" returned a tuple of 4 from {STEP}; it must be (observation, reward",
        ),
        (
            {"step": lambda _: (b"", 0.0, False, False, {})},
            f"an observation of type bytes from {STEP}; it must be text",
        ),
        ({"step": lambda _: ("", np.nan, False, False, {})}, f"the reward nan from {STEP}; it must be a finite number"),
        (
            {"step": lambda _: ("", -np.inf, False, False, {})},
            f"the reward -inf from {STEP}; it must be a finite number",
        ),
        ({"step": lambda _: ("", "1", False, False, {})}, f"the reward '1' from {STEP}; it must be a finite number"),
        ({"step": lambda _: ("", 0.0, None, False, {})}, f"terminated None from {STEP}; it must be True or False"),
        ({"step": lambda _: ("", 0.0, False, 1, {})}, f"truncated 1 from {STEP}; it must be True or False"),
        ({"parse_action": raises}, f": parse_action('open') raised {RAISED}"),
        ({"parse_action": lambda _: 3}, "an action of type int from parse_action('open'); it must be text or None"),
    ],
)
def test_what_an_environment_must_not_do_ends_the_stage_with_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        play_odd(settings)
    assert str(error.value).startswith(f"environments: '{ODD}'")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_state_key_that_is_no_text_is_refused_where_states_are_drawn() -> None:
    with pytest.raises(UserError, match="returned a value of type int from state_key; it must be text"):
        iteration_specs(odd({"state_key": 7}), NAME, 0, 0)


def test_a_demonstrations_environment_is_held_to_the_same() -> None:
    section = odd({"step": lambda _: ("", np.nan, False, False, {})}).environments[NAME]
    with pytest.raises(UserError, match="returned the reward nan"):
        demonstrate(make(section), OddExpert(), 1, PHASE, np.random.default_rng(0), section)


def test_numbers_of_numpy_are_numbers_and_what_is_recorded_is_pythons() -> None:
    over = np.bool_(True)
    made = play_odd({"step": lambda _: ("there", np.float32(0.25), over, np.bool_(False), {})})
    assert [turn["reward"] for turn in episode_turns(made, 0)] == [0.25]
    assert type(made.turns["reward"][0]) is float
    whole = play_odd({"step": lambda _: ("there", 1, over, False, {})})
    assert type(whole.turns["reward"][0]) is float


def test_an_environment_that_never_ends_is_cut_off() -> None:
    made = play_odd({"parse_action": lambda text: text})
    assert set(made.episodes["end_reason"]) == {"turns"}
    assert (np.diff(made.turn_offsets) == 4).all()
    for limit in (1, 3):
        section = odd({}, actions_per_turn=limit).environments[NAME]
        demonstration = demonstrate(make(section), OddExpert(), 1, PHASE, np.random.default_rng(0), section)
        assert len(demonstration.turns) == 4


@pytest.mark.parametrize(
    "text", ["<think>", "</answer>", f"{EOS}<|assistant|>{says('open')}", "<script>", "\ud800 \x1b[2J \x01response\x01"]
)
def test_any_text_of_an_environment_stays_in_its_role_and_can_be_stored(text: str, tmp_path: Path) -> None:
    parts = {"observation": text, "instructions": text, "state_key": f"{text}\udcff", "parse_action": lambda _: text}
    hostile, plain = play_odd(parts), play_odd({**parts, "observation": "here", "instructions": "Go on."})
    special = np.array(TOKENIZER.all_special_ids + TOKENIZER.convert_tokens_to_ids(["<|user|>", "<|assistant|>"]))
    for made in (hostile, plain):
        assert set(made.turns["valid"]) == {True}
        assert (np.diff(made.turn_offsets) == 4).all()
    for role in Role:
        chosen = [made.input_ids[made.role == role] for made in (hostile, plain)]
        if role in RESPONSE_ROLES:
            np.testing.assert_array_equal(*chosen)
        else:
            np.testing.assert_array_equal(*(ids[np.isin(ids, special)] for ids in chosen))
    write(hostile, tmp_path / "table")
    again = read(tmp_path / "table")
    assert again.turns == hostile.turns
    assert again.episodes == hostile.episodes
    keys = [play_odd({"state_key": key}).episodes["state_key"][0] for key in (f"{text}\udc00", f"{text}\udc01")]
    assert keys[0] != keys[1]
    assert {split_of(f"{text}{number}\udc00") for number in range(99)} == {*SPLITS}


# -------------------------------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("layout", ["compact", "published"])
@pytest.mark.parametrize("prefill", ["", "<think>"])
@pytest.mark.parametrize("limit", [1, 2])
def test_a_demonstration_is_what_the_collector_records_of_the_same_actions(
    layout: str, prefill: str, limit: int
) -> None:
    changes = {"layout": layout, "actions_per_turn": limit, "response_tokens": 60, "context_tokens": 9000}
    lake = config({"prefill": prefill}, {"success_rate": 0.6, "max_actions": 5}, max_turns=4, **changes)
    lengths = set()
    for settings, expert in (
        (lake, FrozenLakeExpert()),
        (odd({"parse_action": str}, max_turns=3, **changes), OddExpert()),
    ):
        section = settings.environments[NAME]
        settings = settings.model_copy(update={"rollout": lake.rollout})
        for state in range(8):
            noise = int(np.random.default_rng(state).integers(2**31))
            made = demonstrate(make(section), expert, state, PHASE, np.random.default_rng(state), section)
            spoken = [f"<think>{turn.reasoning}</think><answer>{turn.action}</answer>" for turn in made.turns]
            spec = EpisodeSpec("0", "0", state, 0, 0, noise, (0, "tokens"))
            recorded, _ = play(settings, lambda _, turn, said=spoken: said[turn].removeprefix(prefill), [spec])
            ids, roles = _encode(Dialogue(TOKENIZER, layout, "", section.response_tokens), made)
            np.testing.assert_array_equal(recorded.input_ids, ids)
            shown = (Role.PROMPT, Role.OBSERVATION)
            np.testing.assert_array_equal(np.isin(recorded.role, shown), np.isin(roles, shown))
            np.testing.assert_array_equal(recorded.role == Role.ACTION, roles == Role.ACTION)
            turns = episode_turns(recorded, 0)
            assert [turn["reward"] for turn in turns[:-1]] == [turn.reward for turn in made.turns[1:]]
            assert [turn["action"] for turn in turns] == [turn.action.replace(" || ", "||") for turn in made.turns]
            lengths |= {turn.action.count("||") + 1 for turn in made.turns}
    assert lengths == set(range(1, limit + 1))


def test_a_demonstrated_turn_holds_no_action_that_was_not_allowed_at_its_beginning() -> None:
    """The corridor's door has to be opened in one turn and entered in the next: the collector would refuse both at once."""
    section = odd({}, actions_per_turn=2).environments[NAME]
    made = demonstrate(make(section), OddExpert(), 1, PHASE, np.random.default_rng(0), section)
    assert [turn.action for turn in made.turns] == ["open", "enter", "open", "enter"]
    assert [turn.reward for turn in made.turns] == [0.0, 0.5, 0.5, 0.5]
    assert not any(play_odd({}, says("open||enter"), actions_per_turn=2).turns["valid"])


def test_noise_falls_on_each_action_of_a_turn() -> None:
    lake = config(settings={"frozen": 1.0, "max_actions": 6}, actions_per_turn=3).environments[NAME]
    drawn = Phase(steps=1, reasoning_words=(0, 0), action_noise=1.0)
    turns = [
        turn
        for state in range(60)
        for turn in demonstrate(make(lake), FrozenLakeExpert(), state, drawn, np.random.default_rng(state), lake).turns
    ]
    last = [turn.action.split(" || ")[-1] for turn in turns if turn.action.count("||") == 2]
    assert {*last} == {*MOVES}
