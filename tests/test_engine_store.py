"""What the engine keeps of earlier calls: used again, given up, never wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.model.kernels import library, native
from pipeline.model.policy import Policy
from pipeline.rollout.engine import Continuation, Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine
from tests.engine_cases import (
    STOP,
    assert_scored_by_a_fresh_forward,
    conversations,
    distinct_positions,
    draws_for,
    encode,
    named,
    passes,
    play,
    random_policy,
)


@pytest.fixture(scope="module", params=[("qwen2", 8), ("qwen2", 16), ("llama", 8), ("llama", 16)], ids=named)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Heads of 8 numbers attend through PyTorch, those of 16 through the native kernel, where there is a compiler."""
    made = random_policy(*request.param, tmp_path_factory.mktemp(request.param[0]) / "policy")
    assert native.attends(torch.empty(1, request.param[1])) == (
        request.param[1] == 16 and library.library() is not None
    )
    return made


def test_a_cold_engine_continues_as_a_warm_one(policy: Policy) -> None:
    """What the cache holds from earlier turns changes nothing."""
    sampling = Sampling(1.0, STOP)
    for turns in play(TransformersEngine(policy), conversations(policy), sampling):
        for request, answer in turns[1:]:
            cold = TransformersEngine(policy).generate([request], sampling)[0]
            assert cold.ids == answer.ids
            np.testing.assert_allclose(cold.logprob, answer.logprob, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 128])
def test_no_position_is_computed_twice(policy: Policy, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Shared prompts pass once, everything else once per episode, whoever has to wait for a slot."""
    engine, episodes = TransformersEngine(policy, slots), conversations(policy, adjacent=True)
    with passes(monkeypatch) as lengths:
        play(engine, episodes, Sampling(1.0, STOP))
    assert sum(lengths) == engine.positions_computed == distinct_positions(episodes)


@pytest.mark.parametrize("slots", [1, 2, 3, 128])
def test_a_late_member_computes_at_most_its_prompt_again(policy: Policy, slots: int) -> None:
    """Between the members of a group came others, who may have taken the slots that held its prompt."""
    engine, episodes = TransformersEngine(policy, slots), conversations(policy)
    play(engine, episodes, Sampling(1.0, STOP))
    least, repeated = distinct_positions(episodes), {tuple(episode.prompt) for episode in episodes}
    late = sum(len(episode.prompt) for episode in episodes) - sum(map(len, repeated))
    assert least <= engine.positions_computed <= least + (late if slots < len(episodes) else 0)


def test_different_prompts_share_what_they_begin_with(policy: Policy) -> None:
    engine, sampling = TransformersEngine(policy, slots=1), Sampling(1.0, STOP)
    shared, one, two = encode(policy, "player 0 1"), encode(policy, "goal 3"), encode(policy, "holes 1 2")
    requests = [Request([*shared, *rest], np.array([0.2, 0.7])) for rest in (one, two)]
    for request, answer in zip(requests, engine.generate(requests, sampling), strict=True):
        assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)
    assert engine.positions_computed == len(shared) + len(one) + len(two) + 2


def test_a_later_call_uses_what_is_stored(policy: Policy) -> None:
    """A continued prefix costs what is new in it, and a prompt that was there nothing; until ``forget``."""
    engine, sampling = TransformersEngine(policy, slots=3), Sampling(1.0, STOP)
    prompt, more, draws = encode(policy, "player 0 1 goal"), encode(policy, "holes 1 2"), np.array([0.3, 0.6, 0.9])
    first = engine.generate([Request(prompt, draws)], sampling)[0]
    assert engine.positions_computed == len(prompt) + 2
    longer = Request([*prompt, *first.ids, *more], draws)
    second = engine.generate([longer], sampling)[0]
    assert engine.positions_computed == len(longer.ids) + 2
    assert_scored_by_a_fresh_forward(policy, longer.ids, second, 1.0)
    again = engine.generate([Request(prompt, draws)] * 2, sampling)
    assert engine.positions_computed == len(longer.ids) + 2 + 2 * 2
    assert [answer.ids for answer in again] == [first.ids] * 2
    engine.forget()
    assert engine.positions_computed == 0
    assert engine.generate([Request(prompt, draws)], sampling)[0].ids == first.ids
    assert engine.positions_computed == len(prompt) + 2


def test_the_slot_that_has_been_idle_longest_is_given_up_first(policy: Policy) -> None:
    """Of five prompts, one a call, three slots hold the last three: these are continued, the others begun anew."""
    engine, sampling, draws = TransformersEngine(policy, slots=3), Sampling(1.0, STOP), np.array([0.3, 0.6])
    prompts = [[40 + number] * 9 for number in range(5)]
    said = [engine.generate([Request(prompt, draws)], sampling)[0].ids for prompt in prompts]
    cost = {}
    for number in (2, 3, 4, 0):
        before = engine.positions_computed
        request = Request([*prompts[number], *said[number], 60], draws)
        (answer,) = engine.generate([request], sampling)
        assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)
        cost[number] = engine.positions_computed - before
    # the last token said, the one after it, and the first of the two that are sampled now
    assert cost == {2: 3, 3: 3, 4: 3, 0: 9 + 2 + 1 + 1}


def test_a_stored_prefix_is_continued_at_any_token(policy: Policy) -> None:
    """Branches off a finished episode: each place costs its last token once, and what is sampled there."""
    engine, sampling = TransformersEngine(policy, slots=64), Sampling(1.0, STOP)
    (episode,) = conversations(policy)[3:4]
    play(engine, [episode], sampling)
    draws, before = np.random.default_rng(0), engine.positions_computed
    for split in range(1, len(episode.ids), 4):
        siblings = [Request(episode.ids[:split], draws.random(3)) for _ in range(3)]
        answers = engine.generate(siblings, sampling)
        for request, answer in zip(siblings, answers, strict=True):
            assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)
        spent, before = engine.positions_computed - before, engine.positions_computed
        at_prompt = split == len(episode.prompt)  # whose logits are kept
        assert spent == sum(len(answer.ids) - 1 for answer in answers) + (not at_prompt)


def test_slots_are_free_again_after_the_caller_has_raised(policy: Policy) -> None:
    def follow(number: int, answer: Continuation) -> None:
        raise RuntimeError("the caller's")

    engine, sampling = TransformersEngine(policy, slots=2), Sampling(1.0, STOP)
    requests = [Request([40 + number, 41], np.array([0.3, 0.6])) for number in range(3)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the caller's"):
            engine.generate(requests, sampling, follow)
    for request, answer in zip(requests, engine.generate(requests, sampling), strict=True):
        assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)


def test_nobody_waits_for_the_end_of_anothers_turn(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn of six tokens beside three of two: six steps."""
    wanted, prompt = [20, 21, 22, 23, 24, 25], encode(policy, "goal 3 3")
    assert STOP not in policy.tokenizer.decode(wanted)
    long = Request(prompt, draws_for(policy, prompt, wanted, 1.0))
    prefix, turns, finished = list(prompt), 3, []

    def speak() -> Request:
        return Request(list(prefix), draws_for(policy, prefix, [30, 31], 1.0))

    def follow(number: int, answer: Continuation) -> Request | None:
        nonlocal turns
        finished.append(number)
        if number == 0:
            return None
        turns -= 1
        prefix.extend([*answer.ids, 32, 33])
        return speak() if turns else None

    with passes(monkeypatch) as lengths:
        last = TransformersEngine(policy, slots=2).generate([long, speak()], Sampling(1.0, STOP), follow)
    assert [answer.ids for answer in last] == [wanted, [30, 31]]
    assert sorted(finished) == [0, 1, 1, 1]
    assert finished[:2] == [1, 1]
    assert len(lengths) == 6


def test_requests_are_taken_when_there_is_room(policy: Policy) -> None:
    taken, ended = 0, 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for number in range(7):
            assert taken - ended < 3
            taken += 1
            yield Request([40 + number, 41], np.full(1 + number % 3, 0.5))

    def follow(number: int, answer: Continuation) -> None:
        nonlocal ended
        ended += 1

    answers = TransformersEngine(policy, slots=3).generate(requests(), Sampling(1.0, STOP), follow)
    assert len(answers) == taken == ended == 7


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 2)), min_size=4, max_size=14), st.integers(1, 3))
@example([(0, 1), (1, 1), (0, 1), (2, 1)], 2)
def test_prompts_may_come_and_come_again_in_any_order(policy: Policy, said: list[tuple[int, int]], slots: int) -> None:
    """What is kept of old prompts is dropped when there are more than slots; nobody who is to use it is forgotten."""
    sampling, engine = Sampling(1.0, STOP), TransformersEngine(policy, slots)
    requests = [Request([40 + prompt] * (2 + prompt % 3), np.array([0.3, 0.6][:tokens])) for prompt, tokens in said]
    for request, answer in zip(requests, engine.generate(requests, sampling), strict=True):
        assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)


def test_what_stood_behind_another_beginning_is_not_taken(policy: Policy) -> None:
    """The third prompt is the second with the first's end, which was computed behind other tokens."""
    engine, sampling = TransformersEngine(policy, slots=1), Sampling(1.0, STOP)
    for prompt in ([40, 41, 42, 43, 44], [40, 50], [40, 50, 42, 43, 44]):
        answer = engine.generate([Request(prompt, np.array([0.5]))], sampling)[0]
        assert_scored_by_a_fresh_forward(policy, prompt, answer, 1.0)


def test_an_engine_takes_changed_prefixes_and_old_ones_in_another_order(policy: Policy) -> None:
    sampling, engine = Sampling(1.0, STOP), TransformersEngine(policy, slots=2)
    first, second, third = (encode(policy, text) for text in ("Left Up", "goal 3 3", "holes"))
    draws = np.random.default_rng(0).random((4, 5))
    a, b = engine.generate([Request(first, draws[0]), Request(second, draws[1])], sampling)
    swapped = [Request([*second, *b.ids, *third], draws[2]), Request([*first, *a.ids, *second], draws[3])]
    changed = [Request(second, draws[0]), Request(second[:1], draws[1])]
    rewritten = [Request([*third, *second, *third, *second], draws[2])]
    fresh = [Request(third, draws[2])]
    for requests in (swapped, changed, rewritten, fresh, changed):
        for request, answer in zip(requests, engine.generate(requests, sampling), strict=True):
            assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)
    assert engine.generate([], sampling) == []
