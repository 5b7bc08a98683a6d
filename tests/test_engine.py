"""The transformers engine against plain full forward passes: several architectures, two tokenizers, both caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.model.kernels import library, native
from pipeline.model.policy import Policy
from pipeline.rollout import transformers_engine
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine
from tests.engine_cases import (
    STOP,
    Record,
    assert_scored_by_a_fresh_forward,
    conversations,
    distinct_positions,
    full_logprobs,
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


def assert_same(actual: Record, expected: Record) -> None:
    """The same tokens, with the same statistics up to rounding."""
    for ours, theirs in zip(actual, expected, strict=True):
        for (asked, answer), (other_asked, other) in zip(ours, theirs, strict=True):
            assert (asked.ids, answer.ids, answer.finish) == (other_asked.ids, other.ids, other.finish)
            np.testing.assert_allclose(answer.logprob, other.logprob, atol=1e-4)
            np.testing.assert_allclose(answer.entropy, other.entropy, atol=1e-4)


def one_by_one(
    answer: Callable[[Request], Continuation], requests: Iterable[Request], follow: Follow | None
) -> list[Continuation]:
    """``RolloutEngine.generate`` with one episode after another."""
    last = []
    for number, first in enumerate(requests):
        request: Request | None = first
        while request is not None:
            last[number:] = [answer(request)]
            request = follow(number, last[number]) if follow else None
    return last


class SlowEngine:
    """The contract at its plainest: one episode after another, the whole prefix anew for every token.

    ``margin`` keeps for every answer the least distance of a draw to where another token begins.
    """

    policy_version = 0

    def __init__(self, policy: Policy) -> None:
        self.policy, self.margin = policy, dict[int, float]()

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        return one_by_one(lambda request: self._continue(request, sampling), requests, follow)

    def forget(self) -> None: ...

    def sync(self, policy: Policy, version: int) -> None: ...

    def _continue(self, request: Request, sampling: Sampling) -> Continuation:
        answer, prefix, margin = Continuation([], [], [], "length", 0), list(request.ids), 1.0
        forced = prefix[len(prefix) - request.forced :]
        for draw in request.uniforms:
            logprobs = full_logprobs(self.policy, [*prefix, *answer.ids], sampling.temperature)[-1].numpy()
            borders = np.exp(logprobs).cumsum()
            token = int((borders <= draw).sum())
            margin = min(margin, np.abs(borders - draw).min())
            answer.ids.append(token)
            answer.logprob.append(logprobs[token])
            answer.entropy.append(-(np.exp(logprobs) * logprobs).sum())
            text = self.policy.tokenizer.decode([*forced, *answer.ids], skip_special_tokens=False)
            if sampling.stop in text or token == self.policy.tokenizer.eos_token_id:
                answer = replace(answer, finish="stop" if sampling.stop in text else "eos")
                break
        self.margin[id(request)] = margin
        return answer


def assert_same_where_rounding_decides_nothing(policy: Policy, engine: TransformersEngine, sampling: Sampling) -> None:
    slow = SlowEngine(policy)
    expected = play(slow, conversations(policy), sampling)
    actual = play(engine, conversations(policy), sampling)
    compared = 0
    for ours, theirs in zip(actual, expected, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            if slow.margin[id(other[0])] < 1e-5:
                break  # the rest of this episode may rightly be another
            assert_same([[own]], [[other]])
            compared += len(own[1].ids)
    assert compared > 60


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_turn_is_scored_as_by_a_fresh_full_forward(policy: Policy, temperature: float) -> None:
    record = play(TransformersEngine(policy), conversations(policy), Sampling(temperature, STOP))
    assert len({len(answer.ids) for turns in record for _, answer in turns}) > 3
    for turns in record:
        for request, answer in turns:
            assert_scored_by_a_fresh_forward(policy, request.ids, answer, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_same_draws_give_the_tokens_of_a_slow_engine(policy: Policy, temperature: float) -> None:
    engine = TransformersEngine(policy, slots=4)
    assert_same_where_rounding_decides_nothing(policy, engine, Sampling(temperature, STOP))


@pytest.mark.parametrize("kind", [("gpt2", 8), ("gpt2", 16), ("gpt_neox", 8), ("gpt_neox", 16)], ids=named)
def test_other_families_are_sampled_as_by_a_slow_engine(kind: tuple[str, int], tmp_path: Path) -> None:
    """Through the family's own forward: with learned positions, and with its own rotation."""
    policy = random_policy(*kind, tmp_path)
    assert_same_where_rounding_decides_nothing(policy, TransformersEngine(policy, slots=4), Sampling(1.0, STOP))


def test_batch_does_not_change_what_is_sampled(policy: Policy) -> None:
    """Each episode alone in an engine of its own samples the ids that it sampled beside five others."""
    sampling = Sampling(1.0, STOP)
    together = play(TransformersEngine(policy), conversations(policy), sampling)
    for number, episode in enumerate(conversations(policy)):
        assert_same(play(TransformersEngine(policy), [episode], sampling), [together[number]])


@pytest.mark.parametrize("adjacent", [True, False])
def test_number_of_slots_changes_nothing(policy: Policy, adjacent: bool) -> None:
    sampling = Sampling(1.0, STOP)
    enough = play(TransformersEngine(policy, slots=6), conversations(policy, adjacent), sampling)
    for slots in (1, 2, 3, 4):
        assert_same(play(TransformersEngine(policy, slots), conversations(policy, adjacent), sampling), enough)


@pytest.mark.parametrize("limit", [1, 7, 25])
def test_tokens_that_pass_at_once_change_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Only what is longer than the limit by itself exceeds it."""
    sampling, episodes = Sampling(1.0, STOP), conversations(policy)
    free = play(TransformersEngine(policy), conversations(policy), sampling)
    monkeypatch.setattr(transformers_engine, "TOKENS_PER_STEP", limit)
    engine = TransformersEngine(policy, slots=4)
    with passes(monkeypatch) as lengths:
        assert_same(play(engine, episodes, sampling), free)
    assert max(lengths) <= max(limit, *(len(episode.prompt) for episode in episodes), 8 + 11)
    assert sum(lengths) == distinct_positions(episodes)


def test_a_member_does_not_begin_before_its_prompt_is_there(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt was seen, but no slot holds it any more; while it waits for its step, so do all that share it."""
    prompt, other, first = list(range(40, 60)), [8, 9], [70] * 15
    draws, sampling, engine = np.array([0.3, 0.4, 0.5]), Sampling(1.0, STOP), TransformersEngine(policy, slots=3)
    engine.generate([Request(prompt, draws)], sampling)
    engine.generate([Request(other, draws)] * 3, sampling)
    monkeypatch.setattr(transformers_engine, "TOKENS_PER_STEP", 20)
    requests = [Request(ids, draws) for ids in (first, prompt, prompt)]
    for request, answer in zip(requests, engine.generate(requests, sampling), strict=True):
        assert_scored_by_a_fresh_forward(policy, request.ids, answer, 1.0)
