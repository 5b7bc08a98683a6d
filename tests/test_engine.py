"""The transformers engine against plain full forward passes, on two architectures and two tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.policy.model import Policy, load_policy
from pipeline.policy.tokenizer import train_tokenizer
from pipeline.rollout.engine import Continuation, Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine, sample

TEXTS = ["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down", "let me think, rows apart 2", "<think> <answer>"] * 3
STOP = "</answer>"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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


def random_policy(kind: str, directory: Path) -> Policy:
    """Saved and loaded, as every policy of the pipeline is."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(TEXTS, 320) if kind == "qwen2" else plain_tokenizer()
    shape = {
        **SHAPE,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    Policy(model.eval(), tokenizer).save(directory)
    return load_policy(directory)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return random_policy(request.param, tmp_path_factory.mktemp(request.param) / "policy")


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

    def __init__(self, key: str, prompt: list[int], seed: int, turns: int) -> None:
        self.key, self.ids, self.turns, self.prompt = key, list(prompt), turns, list(prompt)
        self.draws = np.random.default_rng(seed)

    def request(self) -> Request:
        return Request(self.key, list(self.ids), self.draws.random(int(self.draws.integers(1, 9))))

    def take(self, answer: Continuation) -> None:
        self.ids += answer.ids
        self.turns -= 1
        if self.turns:
            self.ids += self.draws.integers(3, 250, size=int(self.draws.integers(1, 12))).tolist()


def conversations(policy: Policy) -> list[Conversation]:
    """Six episodes of three prompts, one prompt shared by three of them; they leave at different turns."""
    shared = encode(policy, "player 0 1 goal 3 3")
    prompts = [shared, encode(policy, "Up"), shared, encode(policy, "let me think, holes 1 2, rows apart 2"), shared]
    prompts.append(encode(policy, "Up"))
    turns = [4, 2, 1, 5, 3, 5]
    return [Conversation(str(i), p, 10 + i, t) for i, (p, t) in enumerate(zip(prompts, turns, strict=True))]


def play(engine: TransformersEngine, episodes: list[Conversation], sampling: Sampling) -> dict[str, list[Any]]:
    """All turns of all episodes, batched over whoever still speaks."""
    record: dict[str, list[Any]] = {episode.key: [] for episode in episodes}
    active = list(episodes)
    while active:
        requests = [episode.request() for episode in active]
        for episode, request, answer in zip(active, requests, engine.generate(requests, sampling), strict=True):
            record[episode.key].append((request, answer))
            episode.take(answer)
        active = [episode for episode in active if episode.turns]
    return record


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_turn_is_scored_as_by_a_fresh_full_forward(policy: Policy, temperature: float) -> None:
    record = play(TransformersEngine(policy), conversations(policy), Sampling(temperature, STOP))
    assert len({len(answer.ids) for turns in record.values() for _, answer in turns}) > 3
    for turns in record.values():
        for request, answer in turns:
            assert_scored_by_a_fresh_forward(policy, request.ids, answer, temperature)


def test_batch_does_not_change_what_is_sampled(policy: Policy) -> None:
    """Each episode alone in an engine of its own samples the ids that it sampled beside five others."""
    sampling = Sampling(1.0, STOP)
    together = play(TransformersEngine(policy), conversations(policy), sampling)
    for number, episode in enumerate(conversations(policy)):
        alone = play(TransformersEngine(policy), [episode], sampling)[str(number)]
        assert [answer.ids for _, answer in alone] == [answer.ids for _, answer in together[str(number)]]
        assert [answer.finish for _, answer in alone] == [answer.finish for _, answer in together[str(number)]]


def test_a_cold_engine_continues_as_a_warm_one(policy: Policy) -> None:
    """What the cache holds from earlier turns changes nothing."""
    sampling = Sampling(1.0, STOP)
    for turns in play(TransformersEngine(policy), conversations(policy), sampling).values():
        for request, answer in turns[1:]:
            cold = TransformersEngine(policy).generate([request], sampling)[0]
            assert cold.ids == answer.ids
            np.testing.assert_allclose(cold.logprob, answer.logprob, atol=1e-4)


def test_no_position_is_computed_twice(policy: Policy) -> None:
    """Shared prompts pass once, everything else once per episode; a last sampled token never has to."""
    engine, episodes = TransformersEngine(policy), conversations(policy)
    passed: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        width = kwargs["input_ids"].shape[1]
        passed.append(int(kwargs["attention_mask"][:, -width:].sum()))

    hook = policy.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        play(engine, episodes, Sampling(1.0, STOP))
    finally:
        hook.remove()
    shared = sum(len(prompt) for prompt in {tuple(episode.prompt) for episode in episodes})
    own = sum(len(episode.ids) - len(episode.prompt) - 1 for episode in episodes)
    assert sum(passed) == shared + own
    assert engine.positions_computed == shared + own


def test_an_engine_takes_new_keys_changed_prefixes_and_old_keys_in_another_order(policy: Policy) -> None:
    sampling, engine = Sampling(1.0, STOP), TransformersEngine(policy)
    first, second, third = (encode(policy, text) for text in ("Left Up", "goal 3 3", "holes"))
    draws = np.random.default_rng(0).random((4, 5))
    a, b = engine.generate([Request("a", first, draws[0]), Request("b", second, draws[1])], sampling)
    swapped = [Request("b", [*second, *b.ids, *third], draws[2]), Request("a", [*first, *a.ids, *second], draws[3])]
    changed = [Request("a", second, draws[0]), Request("b", second[:1], draws[1])]
    rewritten = [Request("a", [*third, *second, *third, *second], draws[2])]
    fresh = [Request("c", third, draws[2])]
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
        requests.append(Request(finish, prefix, np.concatenate([draws, spare])))
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
        answer = TransformersEngine(policy).generate([Request("a", prefix, draws)], Sampling(1.0, stop))[0]
        assert answer.finish == "stop"
        assert answer.ids == ids[: len(answer.ids)]
        assert stop in policy.tokenizer.decode(answer.ids)
        assert stop not in policy.tokenizer.decode(answer.ids[:-1])


def test_stop_text_of_an_earlier_response_does_not_count(policy: Policy) -> None:
    prefix = encode(policy, f"Left{STOP}")
    wanted = encode(policy, "Up Down")
    request = Request("a", prefix, draws_for(policy, prefix, wanted, 1.0))
    answer = TransformersEngine(policy).generate([request], Sampling(1.0, STOP))[0]
    assert (answer.finish, answer.ids) == ("length", wanted)


def test_forced_tokens_count_for_the_stop_text_and_are_not_returned(policy: Policy) -> None:
    opened = [*encode(policy, "</"), *encode(policy, "an")]
    rest = [policy.tokenizer.convert_tokens_to_ids(letter) for letter in "swer>"]
    prefix = [*encode(policy, "goal 3 3"), *opened]
    draws = np.concatenate([draws_for(policy, prefix, rest, 1.0), [0.5, 0.5]])
    finishes = {}
    for forced in (len(opened), 0):
        request = Request("a", prefix, draws, forced=forced)
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
        answer = TransformersEngine(policy).generate([Request("a", prefix, draws)], Sampling(1.0, STOP))[0]
    finally:
        policy.model.generation_config.eos_token_id = configured
    assert (answer.finish, answer.ids) == ("eos", [other])


def test_weights_changed_in_place_are_used_after_forget(policy: Policy) -> None:
    changed = policy.frozen_copy()
    engine, sampling = TransformersEngine(changed), Sampling(1.0, STOP)
    prefix, draws = encode(policy, "player 0 1 goal 3 3"), np.linspace(0.1, 0.9, 6)
    before = engine.generate([Request("a", prefix, draws)], sampling)[0]
    longer = [*prefix, *before.ids, *encode(policy, "holes 1 2")]
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(0.8)
    engine.forget()
    after = engine.generate([Request("a", longer, draws)], sampling)[0]
    assert_scored_by_a_fresh_forward(changed, longer, after, 1.0)
    old = full_logprobs(policy, [*longer, *after.ids], 1.0)[len(longer) - 1 : -1]
    stale = old[torch.arange(len(after.ids)), torch.tensor(after.ids)].numpy()
    assert np.abs(stale - np.array(after.logprob)).max() > 0.01


def test_training_mode_is_left_as_found(policy: Policy) -> None:
    policy.model.train()
    try:
        TransformersEngine(policy).generate([Request("a", [3, 4], np.array([0.5]))], Sampling(1.0, STOP))
        assert policy.model.training
    finally:
        policy.model.eval()


# ------------------------------------------------------------------------------------------------------- sample


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=8), st.sampled_from([0.5, 1.0, 3.0]))
def test_an_even_grid_of_draws_gives_the_distribution(logits: list[float], temperature: float) -> None:
    grid = 4000
    draws = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rows = torch.tensor([logits]).expand(grid, -1)
    token, logprob, entropy = sample(rows, temperature, draws)
    exact = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, -1)
    frequency = torch.bincount(token, minlength=len(logits)) / grid
    assert float((frequency - exact).abs().max()) <= 1.01 / grid
    assert bool((token.diff() >= 0).all())
    np.testing.assert_allclose(logprob, exact.log()[token], atol=1e-5)
    np.testing.assert_allclose(entropy, torch.full((grid,), -(exact * exact.log()).sum().item()), atol=1e-5)


def test_extreme_draws_never_pick_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, logprob, entropy = sample(logits, 1.0, draws)
    assert token.tolist() == [1, 3, 3]
    np.testing.assert_allclose(logprob, np.log(0.5), atol=1e-6)
    np.testing.assert_allclose(entropy, np.log(2), atol=1e-6)


# ------------------------------------------------------------------------------------------- saving and loading


def test_a_loaded_policy_encodes_and_scores_as_the_saved_one(tmp_path: Path) -> None:
    """transformers rebuilds a known model type's own pre-tokenizer around the vocabulary unless told not to."""
    tokenizer = train_tokenizer(TEXTS, 320)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id))
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
