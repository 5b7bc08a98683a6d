"""The collector: what is recorded is what was sent and returned, and draws depend on names alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.environments import initial_states, make
from pipeline.environments.frozen_lake import MOVES
from pipeline.model.policy import Policy
from pipeline.progress.timing import Phases
from pipeline.rollout import collector
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Sampling
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.trajectories.parsing import END_OF_RESPONSE
from pipeline.trajectories.prompting import Dialogue
from pipeline.trajectories.table import to_table, write
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role
from pipeline.workspace.errors import UserError
from pipeline.workspace.randomness import generator
from tests.scripted import (
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


def wander(key: str, turn: int) -> str:
    """Each member of a group goes another way."""
    return says(list(MOVES)[(int(key[-1]) + turn) % 4])


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
        expected += f"<|user|>{lake._observe()}<|assistant|>{says('Up')}"
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
        expected = dialogue.opening(lake.instructions, lake._observe(), lake.max_actions)
        span = made.role[made.offsets[episode] : made.offsets[episode + 1]] == Role.PROMPT
        ids = made.input_ids[made.offsets[episode] : made.offsets[episode + 1]]
        assert ids[span].tolist() == expected
        assert span[: len(expected)].all()
