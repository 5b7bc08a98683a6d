"""How responses end, sampling from logits, and policies that are saved and loaded."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.kernels import library, native
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.rollout.engine import Continuation, Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine, sample
from pipeline.workspace.finite import NumericsError
from tests.engine_cases import (
    SHAPE,
    STOP,
    TEXTS,
    assert_scored_by_a_fresh_forward,
    draws_for,
    encode,
    full_logprobs,
    named,
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


# --------------------------------------------------------------------------------------------------- how responses end


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


def test_weights_changed_in_place_are_used_after_sync(policy: Policy) -> None:
    changed = policy.frozen_copy()
    engine, sampling = TransformersEngine(changed), Sampling(1.0, STOP)
    prefix, draws = encode(policy, "player 0 1 goal 3 3"), np.linspace(0.1, 0.9, 6)
    before = engine.generate([Request(prefix, draws)], sampling)[0]
    longer = [*prefix, *before.ids, *encode(policy, "holes 1 2")]
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(0.8)
    with pytest.raises(NumericsError, match=r"sync\(\)"):
        engine.generate([Request(longer, draws)], sampling)
    assert before.policy_version == 0
    engine.sync(changed, 7)
    after = engine.generate([Request(longer, draws)], sampling)[0]
    assert after.policy_version == 7
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
