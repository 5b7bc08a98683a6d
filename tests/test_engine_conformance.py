"""What every engine does: the same suite, whichever samples. Run by itself, vLLM's part is `make test-vllm`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.model.policy import Policy
from pipeline.rollout.engine import Continuation, Request, RolloutEngine, Sampling
from pipeline.rollout.making import make_engine
from pipeline.settings.params import Config
from pipeline.settings.presets import overlay
from tests.engine_cases import STOP, Record, conversations, encode, full_logprobs, play, random_policy
from tests.trainings import configured

SLOTS = 4
CONTEXT = 512
ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {"rollout": {"engine": {"kind": "transformers"}}},
    "vllm": {"rollout": {"engine": {"kind": "vllm"}, "cache_gigabytes": 0.1}},
}
"""By name, what params.yaml says of it. One more needs a line here, and a mark below if it is not always installed."""
MARKS = {"vllm": [pytest.mark.vllm]}
NAMED_DRAWS = ("transformers",)
"""Engines that can be given noise."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Qwen2 with a tied head; heads of 32 numbers are the smallest that vLLM has on a processor."""
    return random_policy("qwen2", 32, tmp_path_factory.mktemp("qwen2") / "policy")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in ENGINES])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    context = {"environments": {"frozen_lake": {"context_tokens": CONTEXT}}}
    weights = {"rollout": {"engine": {"weights": str(tmp_path_factory.mktemp("weights"))}}} if kind == "vllm" else {}
    return configured(overlay(overlay(context, ENGINES[kind]), weights))


@pytest.fixture
def engine(config: Config, policy: Policy) -> Iterator[RolloutEngine]:
    """With weights of the policy's, and the policy as it was at the end."""
    kept = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    made = make_engine(config, policy, SLOTS)
    made.sync(policy, 3)
    yield made
    policy.model.load_state_dict(kept)


def assert_scored(policy: Policy, asked: Request, answer: Continuation, temperature: float) -> None:
    """By a fresh forward of transformers; entropies only where the engine tells them."""
    expected = full_logprobs(policy, [*asked.ids, *answer.ids], temperature)[len(asked.ids) - 1 : -1]
    chosen = expected[torch.arange(len(answer.ids)), torch.tensor(answer.ids)]
    np.testing.assert_allclose(answer.logprob, chosen, atol=1e-4)
    told = ~np.isnan(answer.entropy)
    entropy = -(expected.exp() * expected).sum(-1).numpy()
    np.testing.assert_allclose(np.array(answer.entropy)[told], entropy[told], atol=1e-4)


def assert_well_formed(policy: Policy, record: Record, sampling: Sampling) -> None:
    """Every answer ends as it says, and not before or after."""
    decode = policy.tokenizer.backend_tokenizer.decode
    for turns in record:
        for asked, answer in turns:
            assert answer.policy_version == 3
            assert 0 < len(answer.ids) <= len(asked.uniforms)
            assert len(answer.ids) == len(answer.logprob) == len(answer.entropy)
            forced = list(asked.ids)[len(asked.ids) - asked.forced :]
            texts = [decode([*forced, *answer.ids[:end]], skip_special_tokens=False) for end in (-1, None)]
            stopped, ended = sampling.stop in texts[1], answer.ids[-1] in policy.ends
            expected = "stop" if stopped else "eos" if ended else "length"
            assert answer.finish == expected
            assert sampling.stop not in texts[0] or len(answer.ids) == 1
            assert policy.ends.isdisjoint(answer.ids[:-1])
            assert expected != "length" or len(answer.ids) == len(asked.uniforms)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_turn_is_scored_as_by_a_fresh_forward(policy: Policy, engine: RolloutEngine, temperature: float) -> None:
    sampling = Sampling(temperature, STOP)
    record = play(engine, conversations(policy), sampling)  # six episodes in four slots
    assert len(record) > SLOTS
    assert_well_formed(policy, record, sampling)
    for turns in record:
        for asked, answer in turns:
            assert_scored(policy, asked, answer, temperature)


def test_the_same_request_has_the_same_answer_where_noise_can_be_given(
    kind: str, policy: Policy, engine: RolloutEngine
) -> None:
    one, other = (play(engine, conversations(policy), Sampling(1.0, STOP)) for _ in range(2))
    same = all(
        a.ids == b.ids
        for mine, theirs in zip(one, other, strict=True)
        for (_, a), (_, b) in zip(mine, theirs, strict=True)
    )
    assert same == (kind in NAMED_DRAWS)


def test_answers_are_in_the_order_of_requests(policy: Policy, engine: RolloutEngine) -> None:
    """Long ones first, so that later ones are complete before them."""
    prompts = [encode(policy, "Up"), encode(policy, "player 0 1"), encode(policy, "goal 3 3"), encode(policy, "holes")]
    lengths = [60, 1, 2, 40, 1, 3, 30, 1]
    requests = [Request(prompts[i % 4], np.full(n, 0.5)) for i, n in enumerate(lengths)]
    complete: list[int] = []

    def follow(number: int, answer: Continuation) -> None:
        complete.append(number)
        assert len(answer.ids) <= lengths[number]

    answers = engine.generate(iter(requests), Sampling(1.0, STOP), follow)
    assert sorted(complete) == list(range(len(lengths)))
    assert len(answers) == len(requests)
    for asked, answer in zip(requests, answers, strict=True):
        assert_scored(policy, asked, answer, 1.0)


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(policy: Policy, engine: RolloutEngine) -> None:
    """One letter is soon there; what is forced counts, so that a response may end with its first token."""
    sampling = Sampling(1.0, "o")
    prompt = encode(policy, "player 0 1 goal 3 3")
    requests = [Request(prompt, np.random.default_rng(i).random(60), forced=0) for i in range(8)]
    answers = engine.generate(requests, sampling)
    assert "stop" in {answer.finish for answer in answers}
    assert_well_formed(policy, [[pair] for pair in zip(requests, answers, strict=True)], sampling)


def test_a_stop_text_may_begin_in_what_is_forced(policy: Policy, engine: RolloutEngine) -> None:
    """Any token that begins with the text's second half completes it."""
    prefix = [*encode(policy, "Up"), policy.tokenizer.get_vocab()["<"]]
    favour(policy, prefix, [policy.tokenizer.get_vocab()["/"]])
    engine.sync(policy, 3)
    sampling = Sampling(1.0, "</")
    requests = [Request(prefix, np.random.default_rng(i).random(12), forced=1) for i in range(6)]
    answers = engine.generate(requests, sampling)
    assert [answer.finish for answer in answers].count("stop") > 2
    assert_well_formed(policy, [[pair] for pair in zip(requests, answers, strict=True)], sampling)


def test_any_of_several_end_tokens_ends_a_response(
    policy: Policy, engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = encode(policy, "U")[:1] + encode(policy, "p")[:1]
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", others)
    assert policy.ends == {*others, policy.tokenizer.eos_token_id}
    prefix = encode(policy, "goal")
    favour(policy, prefix, policy.ends)
    engine.sync(policy, 3)
    requests = [Request(prefix, np.random.default_rng(i).random(40)) for i in range(16)]
    answers = engine.generate(requests, Sampling(1.0, STOP))
    assert {answer.ids[-1] for answer in answers if answer.finish == "eos"} == policy.ends
    assert_well_formed(policy, [[pair] for pair in zip(requests, answers, strict=True)], Sampling(1.0, STOP))


def favour(policy: Policy, prefix: list[int], tokens: Iterable[int], logits: float = 12.0) -> None:
    """Give tokens that are not in a prefix equal, high logits behind it: their rows of the head are its hidden state."""
    with torch.no_grad():
        hidden = policy.model.base_model(input_ids=torch.tensor([prefix]), use_cache=False).last_hidden_state[0, -1]
        for token in tokens:
            policy.head.weight[token] = logits * hidden / hidden.norm() ** 2


def test_what_was_computed_for_a_prefix_is_not_computed_again(kind: str, policy: Policy, engine: RolloutEngine) -> None:
    """The second turn of a long episode costs its new tokens, and at most a block of those before."""
    draws, sampling = np.random.default_rng(0), Sampling(1.0, STOP)
    prompt, turns = draws.integers(3, 250, size=300).tolist(), list[int]()
    ids = list(prompt)

    def follow(number: int, answer: Continuation) -> Request | None:
        ids.extend([*answer.ids, *draws.integers(3, 250, size=20).tolist()])
        turns.append(len(ids))
        return None if len(turns) == 3 else Request(list(ids), draws.random(5))

    engine.forget()
    engine.generate([Request(prompt, draws.random(5))], sampling, follow)
    assert 300 <= engine.positions_computed <= sum([300, *turns[:2], 15]) - 2 * 256  # type: ignore[attr-defined]
    engine.forget()
    engine.generate([Request(prompt, draws.random(1))], sampling)
    assert engine.positions_computed >= 300  # type: ignore[attr-defined]


def test_other_weights_are_sampled_from_after_a_sync(policy: Policy, engine: RolloutEngine) -> None:
    """Three times, as it is in the second and third that something stale shows; the head is tied to the embedding."""
    sampling, draws = Sampling(0.7, STOP), np.random.default_rng(5)
    request = Request(encode(policy, "player 0 1 goal 3 3, holes 1 2"), draws.random(24))
    for version in (4, 5, 6):
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(version))
        engine.sync(policy, version)
        for answer in engine.generate([request] * 3, sampling):
            assert answer.policy_version == version
            assert_scored(policy, request, answer, 0.7)


@pytest.mark.parametrize("when", ["in the first answer", "while requests are made"])
def test_an_exception_leaves_the_engine_usable(policy: Policy, engine: RolloutEngine, when: str) -> None:
    class Stopped(Exception):
        pass

    def follow(number: int, answer: Continuation) -> None:
        raise Stopped

    def requests() -> Iterator[Request]:
        for i in range(20):
            if i == 6 and when != "in the first answer":
                raise Stopped
            yield Request(encode(policy, "Up"), np.random.default_rng(i).random(200 if i % 2 else 1))

    with pytest.raises(Stopped):
        engine.generate(requests(), Sampling(1.0, STOP), follow if when == "in the first answer" else lambda *_: None)
    sampling = Sampling(1.0, STOP)
    record = play(engine, conversations(policy), sampling)
    assert_well_formed(policy, record, sampling)
    for turns in record:
        for asked, answer in turns:
            assert_scored(policy, asked, answer, 1.0)


def test_no_request_is_no_answer(engine: RolloutEngine) -> None:
    assert engine.generate([], Sampling(1.0, STOP)) == []
