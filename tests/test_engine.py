"""The transformers engine against plain full forward passes: several architectures, two tokenizers, both caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.kernels import library, native
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.model.trunk import hidden_states
from pipeline.rollout import transformers_engine
from pipeline.rollout.engine import Continuation, Follow, Request, RolloutEngine, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine, sample

TEXTS = ["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down", "let me think, rows apart 2", "<think> <answer>"] * 3
STOP = "</answer>"
SHAPE = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "attn_implementation": "sdpa",
}


def plain_tokenizer() -> Any:
    """Byte-level BPE that knows no tags and has no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def random_policy(kind: str, size: int, directory: Path) -> Policy:
    """Saved and loaded, as every policy of the pipeline is; ``size`` is that of its 4 heads."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(TEXTS, 320) if kind == "qwen2" else plain_tokenizer()
    shape = {
        **SHAPE,
        "hidden_size": 4 * size,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, num_key_value_heads=2, **shape))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, num_key_value_heads=2, **shape))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**shape))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(tie_word_embeddings=False, **shape))
    Policy(model.eval(), tokenizer).save(directory)
    return load_policy(directory)


def named(kind_and_size: tuple[str, int]) -> str:
    return "{}-{}".format(*kind_and_size)


@pytest.fixture(scope="module", params=[("qwen2", 8), ("qwen2", 16), ("llama", 8), ("llama", 16)], ids=named)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Heads of 8 numbers attend through PyTorch, those of 16 through the native kernel, where there is a compiler."""
    made = random_policy(*request.param, tmp_path_factory.mktemp(request.param[0]) / "policy")
    assert native.attends(torch.empty(1, request.param[1])) == (
        request.param[1] == 16 and library.library() is not None
    )
    return made


def encode(policy: Policy, text: str) -> list[int]:
    return list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def full_logprobs(policy: Policy, ids: Sequence[int], temperature: float) -> torch.Tensor:
    """Log-probabilities after every position, from one fresh pass without cache or mask."""
    logits = policy.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits / temperature, -1)


def assert_scored_by_a_fresh_forward(
    policy: Policy, prefix: Sequence[int], answer: Continuation, temperature: float
) -> None:
    expected = full_logprobs(policy, [*prefix, *answer.ids], temperature)[len(prefix) - 1 : -1]
    chosen = expected[torch.arange(len(answer.ids)), torch.tensor(answer.ids)]
    entropy = -(expected.exp() * expected).sum(-1)
    np.testing.assert_allclose(answer.logprob, chosen, atol=1e-4)
    np.testing.assert_allclose(answer.entropy, entropy, atol=1e-4)


def draws_for(policy: Policy, prefix: Sequence[int], wanted: Sequence[int], temperature: float) -> np.ndarray:
    """The uniform draws that make a policy say ``wanted``: the middle of each token's interval."""
    result = []
    logprobs = full_logprobs(policy, [*prefix, *wanted], temperature)
    for t, token in enumerate(wanted):
        probability = logprobs[len(prefix) - 1 + t].exp().numpy()
        result.append(probability[:token].sum() + probability[token] / 2)
    return np.array(result)


class Conversation:
    """An episode as the collector drives it: a growing prefix, draws of its own, observations of varied length."""

    def __init__(self, prompt: list[int], seed: int, turns: int) -> None:
        self.ids, self.turns, self.prompt = list(prompt), turns, list(prompt)
        self.draws = np.random.default_rng(seed)

    def request(self) -> Request:
        return Request(list(self.ids), self.draws.random(int(self.draws.integers(1, 9))))

    def take(self, answer: Continuation) -> None:
        self.ids += answer.ids
        self.turns -= 1
        if self.turns:
            self.ids += self.draws.integers(3, 250, size=int(self.draws.integers(1, 12))).tolist()


def conversations(policy: Policy, adjacent: bool = False) -> list[Conversation]:
    """Six episodes of three prompts, one prompt shared by three of them; they leave at different turns.

    With ``adjacent`` those of one prompt follow each other, as the members of a group do.
    """
    shared = encode(policy, "player 0 1 goal 3 3")
    prompts = [shared, encode(policy, "Up"), shared, encode(policy, "let me think, holes 1 2, rows apart 2"), shared]
    prompts.append(encode(policy, "Up"))
    assert len({prompt[0] for prompt in prompts}) == 3  # so that only equal prompts have anything in common
    turns = [4, 2, 1, 5, 3, 5]
    made = [Conversation(p, 10 + i, t) for i, (p, t) in enumerate(zip(prompts, turns, strict=True))]
    return sorted(made, key=lambda episode: episode.prompt) if adjacent else made


Record = list[list[tuple[Request, Continuation]]]
"""For each episode what was asked and answered, turn by turn."""


def play(engine: RolloutEngine, episodes: list[Conversation], sampling: Sampling) -> Record:
    record: Record = [[] for _ in episodes]
    asked: list[Request] = []

    def requests() -> Iterator[Request]:
        for episode in episodes:
            asked.append(episode.request())
            yield asked[-1]

    def follow(number: int, answer: Continuation) -> Request | None:
        record[number].append((asked[number], answer))
        episodes[number].take(answer)
        if not episodes[number].turns:
            return None
        asked[number] = episodes[number].request()
        return asked[number]

    last = engine.generate(requests(), sampling, follow)
    assert last == [turns[-1][1] for turns in record]
    return record


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


@contextmanager
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of the batches that pass through the model."""
    lengths: list[int] = []

    def counted(backbone: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(len(ids))
        return hidden_states(backbone, ids, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(transformers_engine, "hidden_states", counted)
        yield lengths


def distinct_positions(episodes: list[Conversation]) -> int:
    """Of episodes that are over: shared prompts once, the rest of each; a last sampled token never has to pass."""
    shared = sum(len(prompt) for prompt in {tuple(episode.prompt) for episode in episodes})
    return shared + sum(len(episode.ids) - len(episode.prompt) - 1 for episode in episodes)


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


def test_finishes_by_stop_text_eos_and_length(policy: Policy) -> None:
    prefix, sampling = encode(policy, "goal 3 3"), Sampling(1.0, STOP)
    eos = policy.tokenizer.eos_token_id
    wanted = {
        "stop": [*encode(policy, "a</think>b"), *encode(policy, STOP)],
        "eos": [*encode(policy, "Left"), eos],
        "length": encode(policy, "Right Up Down"),
    }
    requests = []
    for finish, ids in wanted.items():
        draws = draws_for(policy, prefix, ids, 1.0)
        spare = np.empty(0) if finish == "length" else np.full(7, 0.5)
        requests.append(Request(prefix, np.concatenate([draws, spare])))
    answers = TransformersEngine(policy, policy_version=5).generate(requests, sampling)
    for (finish, ids), answer in zip(wanted.items(), answers, strict=True):
        assert answer.finish == finish
        assert answer.ids == ids
        assert len(answer.logprob) == len(answer.entropy) == len(ids)
        assert answer.policy_version == 5
        assert_scored_by_a_fresh_forward(policy, prefix, answer, 1.0)


def test_stop_text_ends_with_the_token_that_completes_it(policy: Policy) -> None:
    """Also in the middle of a token, over many tokens, and not before it is complete."""
    prefix = encode(policy, "goal 3 3")
    for text, stop in (("x</answer", "answer"), ("Right", "igh"), ("√√", "√"), ("<answer></answe></answer>", STOP)):
        ids = encode(policy, text)
        draws = np.concatenate([draws_for(policy, prefix, ids, 1.0), [0.5]])
        answer = TransformersEngine(policy).generate([Request(prefix, draws)], Sampling(1.0, stop))[0]
        assert answer.finish == "stop"
        assert answer.ids == ids[: len(answer.ids)]
        assert stop in policy.tokenizer.decode(answer.ids)
        assert stop not in policy.tokenizer.decode(answer.ids[:-1])


def test_stop_text_of_an_earlier_response_does_not_count(policy: Policy) -> None:
    prefix = encode(policy, f"Left{STOP}")
    wanted = encode(policy, "Up Down")
    request = Request(prefix, draws_for(policy, prefix, wanted, 1.0))
    answer = TransformersEngine(policy).generate([request], Sampling(1.0, STOP))[0]
    assert (answer.finish, answer.ids) == ("length", wanted)


def test_forced_tokens_count_for_the_stop_text_and_are_not_returned(policy: Policy) -> None:
    opened = [*encode(policy, "</"), *encode(policy, "an")]
    rest = [policy.tokenizer.convert_tokens_to_ids(letter) for letter in "swer>"]
    prefix = [*encode(policy, "goal 3 3"), *opened]
    draws = np.concatenate([draws_for(policy, prefix, rest, 1.0), [0.5, 0.5]])
    finishes = {}
    for forced in (len(opened), 0):
        request = Request(prefix, draws, forced=forced)
        answer = TransformersEngine(policy).generate([request], Sampling(1.0, STOP))[0]
        finishes[forced] = answer.finish
        assert answer.ids[: len(rest)] == rest
        assert_scored_by_a_fresh_forward(policy, prefix, answer, 1.0)
    assert finishes == {len(opened): "stop", 0: "length"}


def test_several_end_of_sequence_tokens_are_obeyed(policy: Policy) -> None:
    prefix, (other,) = encode(policy, "goal 3 3"), encode(policy, "U")
    configured = policy.model.generation_config.eos_token_id
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, other]
    try:
        draws = np.concatenate([draws_for(policy, prefix, [other], 1.0), [0.5]])
        answer = TransformersEngine(policy).generate([Request(prefix, draws)], Sampling(1.0, STOP))[0]
    finally:
        policy.model.generation_config.eos_token_id = configured
    assert (answer.finish, answer.ids) == ("eos", [other])


def test_the_tokenizers_own_end_is_obeyed_where_the_settings_name_another(policy: Policy) -> None:
    prefix, (other,), own = encode(policy, "goal 3 3"), encode(policy, "U"), policy.tokenizer.eos_token_id
    configured = policy.model.generation_config.eos_token_id
    policy.model.generation_config.eos_token_id = other
    try:
        assert policy.ends == {own, other}
        draws = np.concatenate([draws_for(policy, prefix, [own], 1.0), [0.5]])
        answer = TransformersEngine(policy).generate([Request(prefix, draws)], Sampling(1.0, STOP))[0]
    finally:
        policy.model.generation_config.eos_token_id = configured
    assert (answer.finish, answer.ids) == ("eos", [own])


def test_weights_changed_in_place_are_used_after_forget(policy: Policy) -> None:
    changed = policy.frozen_copy()
    engine, sampling = TransformersEngine(changed), Sampling(1.0, STOP)
    prefix, draws = encode(policy, "player 0 1 goal 3 3"), np.linspace(0.1, 0.9, 6)
    before = engine.generate([Request(prefix, draws)], sampling)[0]
    longer = [*prefix, *before.ids, *encode(policy, "holes 1 2")]
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(0.8)
    engine.forget()
    after = engine.generate([Request(longer, draws)], sampling)[0]
    assert_scored_by_a_fresh_forward(changed, longer, after, 1.0)
    old = full_logprobs(policy, [*longer, *after.ids], 1.0)[len(longer) - 1 : -1]
    stale = old[torch.arange(len(after.ids)), torch.tensor(after.ids)].numpy()
    assert np.abs(stale - np.array(after.logprob)).max() > 0.01


@pytest.mark.parametrize("fails", [False, True])
def test_training_mode_is_left_as_found(policy: Policy, fails: bool) -> None:
    def follow(number: int, answer: Continuation) -> None:
        if fails:
            raise RuntimeError("the caller's")

    policy.model.train()
    try:
        with pytest.raises(RuntimeError, match="the caller's") if fails else nullcontext():
            TransformersEngine(policy).generate([Request([3, 4], np.array([0.5]))], Sampling(1.0, STOP), follow)
        assert policy.model.training
    finally:
        policy.model.eval()


# ------------------------------------------------------------------------------------------------------- sample


KINDS = [torch.float32, torch.float64]
"""Through the native kernel, where there is a compiler, and as on other devices."""


@settings(max_examples=25)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=8), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from(KINDS))
def test_an_even_grid_of_draws_gives_the_distribution(
    logits: list[float], temperature: float, kind: torch.dtype
) -> None:
    grid = 4000
    draws = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rows = torch.tensor([logits], dtype=kind).expand(grid, -1)
    token, logprob, entropy = sample(rows, temperature, draws)
    exact = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, -1)
    frequency = torch.bincount(token, minlength=len(logits)) / grid
    assert float((frequency - exact).abs().max()) <= 1.01 / grid
    assert bool((token.diff() >= 0).all())
    np.testing.assert_allclose(logprob, exact.log()[token], atol=1e-5)
    np.testing.assert_allclose(entropy, torch.full((grid,), -(exact * exact.log()).sum().item()), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_draws_never_pick_an_impossible_token(kind: torch.dtype) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]], dtype=kind).expand(3, -1)
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, logprob, entropy = sample(logits, 1.0, draws)
    assert token.tolist() == [1, 3, 3]
    np.testing.assert_allclose(logprob, np.log(0.5), atol=1e-6)
    np.testing.assert_allclose(entropy, np.log(2), atol=1e-6)


# ------------------------------------------------------------------------------------------- saving and loading


def test_a_loaded_policy_encodes_and_scores_as_the_saved_one(tmp_path: Path) -> None:
    """transformers rebuilds a known model type's own pre-tokenizer around the vocabulary unless told not to."""
    tokenizer = train_tokenizer(TEXTS, 320)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **SHAPE,
            hidden_size=32,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    saved = Policy(model.eval(), tokenizer)
    saved.save(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    texts = [
        *TEXTS[:4],
        "at 12 goal 345",
        "don't\n\n  stay 1  2",
        "<think>a 1</think><answer>Up</answer>",
        "naïve √ 日本 e\u0301",
    ]
    texts.append(tokenizer.apply_chat_template([{"role": "user", "content": "0 1"}], tokenize=False))
    for text in texts:
        ids = encode(saved, text)
        assert encode(loaded, text) == ids
        assert loaded.tokenizer.decode(ids) == text
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.tokenizer.eos_token_id == tokenizer.eos_token_id
    ids = encode(saved, "player 0 1 goal 3 3")
    assert torch.equal(full_logprobs(loaded, ids, 1.0), full_logprobs(saved, ids, 1.0))


def test_equal_policies_are_saved_as_equal_bytes(policy: Policy, tmp_path: Path) -> None:
    for name in ("one", "two"):
        policy.save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
