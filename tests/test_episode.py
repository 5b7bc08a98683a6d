"""What happens in an episode, and how each response and the episode itself ended."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.environments import initial_states, make
from pipeline.environments.frozen_lake import MOVES, FrozenLakeExpert
from pipeline.evaluation.evaluate import episode_results, summary
from pipeline.objective.batch import token_batch
from pipeline.objective.weights import actfocus_weights
from pipeline.report.episode import show
from pipeline.rollout.engine import Continuation
from pipeline.rollout.episode import Setup
from pipeline.settings.params import Environment
from pipeline.settings.weight import ActFocusWeight
from pipeline.trajectories.prompting import INVALID
from pipeline.trajectories.records import episode_records
from pipeline.trajectories.trajectory import RESPONSES, Role, Trajectories
from pipeline.workspace.randomness import generator
from pipeline.workspace.yaml_files import read_yaml
from tests.scripted import (
    EOS,
    NAME,
    TOKENIZER,
    ScriptedEngine,
    always,
    config,
    episode_text,
    episode_turns,
    lake_at,
    play,
    says,
    specs_of,
)


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
