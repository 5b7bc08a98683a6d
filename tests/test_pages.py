"""Keys and values in pages: shared, copied before they are written to, given up and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig

from pipeline.model.attention import Heads
from pipeline.model.policy import Policy
from pipeline.rollout.engine import Request, Sampling
from pipeline.rollout.key_value_cache import PAGE, SlotCache, attend_masked
from pipeline.rollout.making import make_engine
from pipeline.rollout.pages import Pages
from pipeline.rollout.transformers_engine import Bound, TransformersEngine
from pipeline.workspace.errors import UserError
from tests.engine_cases import STOP, Conversation, conversations, encode, passes, play, random_policy
from tests.kernel_cases import assert_close, normal
from tests.scripted import config as scripted_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[8, 16])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Through PyTorch, and through the kernel where there is a compiler."""
    return random_policy("llama", request.param, tmp_path_factory.mktemp("llama") / "policy")


def pages_of(engine: TransformersEngine) -> Pages:
    assert engine._cache is not None
    return engine._cache.pages


def gigabytes(policy: Policy, pages: float) -> float:
    """Of so many pages."""
    config = policy.model.config
    numbers = config.num_hidden_layers * 2 * config.num_key_value_heads * PAGE * config.head_dim
    return pages * numbers * 4 / 1e9


def long_conversations(policy: Policy, count: int = 8) -> list[Conversation]:
    """Of several pages each, all with the same prompt of a page and a half."""
    prompt = (encode(policy, "player 0 1 goal 3 3 ") * PAGE)[: PAGE * 3 // 2]
    return [Conversation(prompt, seed, 12 + seed) for seed in range(count)]


# ----------------------------------------------------------------------------------------------------------- the pool


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["reserve", "copy", "drop"]), *[st.integers(0, 3)] * 2, st.integers(1, 300))))
def test_pages_are_counted_and_none_is_lost(steps: list[tuple[str, int, int, int]]) -> None:
    """Against slots whose content is known: a page is in use as long as some slot holds it."""
    shape = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, hidden_size=16, num_hidden_layers=1)
    limit = 9
    cache = SlotCache(shape, 4, CPU, torch.float32, gigabytes=(limit + 0.5) * 2 * PAGE * 8 * 4 / 1e9)
    assert cache.pages.limit == limit
    held: list[list[object]] = [[] for _ in range(4)]
    lengths = [0] * 4
    for step, slot, other, length in steps:
        if step == "reserve":
            start, end = lengths[slot], lengths[slot] + length
            span = range(start // PAGE, -(-end // PAGE))
            in_others = [page for number, pages in enumerate(held) if number != slot for page in pages]
            wanted = [at for at in span if at >= len(held[slot]) or held[slot][at] in in_others]
            enough = len({*in_others, *held[slot]}) + len(wanted) <= limit
            assert cache.reserve(slot, start, end) == enough
            if enough:
                lengths[slot] = end
                held[slot] += [None] * (span.stop - len(held[slot]))
                for at in wanted:
                    held[slot][at] = object()
        elif step == "copy":
            length = min(length, lengths[other])
            cache.copy(other, slot, length)
            held[slot], lengths[slot] = held[other][: -(-length // PAGE)], length
        else:
            cache.drop(slot)
            held[slot], lengths[slot] = [], 0
        assert cache.pages.used == len({page for pages in held for page in pages})
        assert cache.pages.left == limit - cache.pages.used
    for slot in range(4):
        cache.drop(slot)
    assert cache.pages.used == 0
    assert not cache.pages.holders.any()


def test_a_page_is_zeros_or_a_copy() -> None:
    pages = Pages(2, 6, 3, CPU, torch.float64)
    first = pages.take()
    pages.chunks[0][:, first] = torch.arange(12.0).view(2, 6)
    second = pages.take(copied=first)
    assert torch.equal(pages.chunks[0][:, second], pages.chunks[0][:, first])
    assert pages.addresses[1, second] == pages.chunks[0][1, second].data_ptr()
    pages.give_back(np.array([first]))
    assert pages.take() == first
    assert not pages.chunks[0][:, first].any()


def test_attention_without_room_is_refused() -> None:
    shape = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, hidden_size=32, num_hidden_layers=1)
    cache = SlotCache(shape, 2, CPU, torch.float32)
    for slots, positions in (([0], [0]), ([0], [PAGE]), ([1], [3])):
        with pytest.raises(ValueError, match="reserve it"):
            cache.attention(np.array(slots), np.array(positions))
        assert cache.reserve(0, 0, PAGE)
        cache.copy(0, 1, 3)  # whoever writes next must have the page alone


# --------------------------------------------------------------------------------------------------- windows and caps


@pytest.mark.parametrize("window", [None, 1, 5, 70])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_windows_and_caps(window: int | None, cap: float | None) -> None:
    """Chunks and single tokens, against attention written out token by token."""
    shape = Gemma2Config(
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64, num_hidden_layers=1, sliding_window=5
    )
    cache = SlotCache(shape, 3, CPU, torch.float32)
    query, key, value = (normal(2, 150, heads, 16, seed=heads + i) * 2 for i, heads in enumerate((4, 2, 2)))
    at = [0, 0]
    for counts in ((90, 1), (1, 40), (1, 1), (30, 80)):
        spans = [np.arange(start, start + count) for start, count in zip(at, counts, strict=True)]
        for slot, span in enumerate(spans):
            assert cache.reserve(slot, int(span[0]), int(span[-1]) + 1)
        slots, places = np.repeat([0, 1], counts), np.concatenate(spans)
        new = (x[slots, places] for x in (query, key, value))
        mixed = cache.attention(slots, places)(0, Heads(*new, None, 0.3, window=window, cap=cap))
        at = [start + count for start, count in zip(at, counts, strict=True)]
        for token, (slot, place) in enumerate(zip(slots, places, strict=True)):
            first = 0 if window is None else max(0, place + 1 - window)
            for head in range(4):
                scores = key[slot, first : place + 1, head // 2].double() @ query[slot, place, head].double() * 0.3
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                expected = torch.softmax(scores, 0) @ value[slot, first : place + 1, head // 2].double()
                assert_close(mixed[token, head], expected, 1e-5)


def test_a_cap_that_is_never_reached_is_none() -> None:
    query, key, value = normal(2, 4, 3, 8, seed=0), normal(2, 2, 7, 8, seed=1), normal(2, 2, 7, 8, seed=2)
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool).tril(4)
    assert_close(attend_masked(query, key, value, mask, 0.3, 1e4), attend_masked(query, key, value, mask, 0.3, None))


# ---------------------------------------------------------------------------------------------------------- the engine


def test_what_a_group_shares_is_held_once(policy: Policy) -> None:
    """32 episodes of four prompts: full pages of a prompt once, everything behind them for each; nothing after ``forget``."""
    engine, draws = TransformersEngine(policy, 32), np.random.default_rng(0).random((32, 30))
    prompts = [[40 + number] * (3 * PAGE + 10) for number in range(4)]
    requests = [Request(prompts[number // 8], draws[number]) for number in range(32)]
    answers = engine.generate(requests, Sampling(1.0, "\x00never"))
    assert sum(len(answer.ids) for answer in answers) > 32 * 10
    assert pages_of(engine).used == 4 * 3 + 32
    engine.forget()
    assert pages_of(engine).used == 0
    engine.generate(requests, Sampling(1.0, "\x00never"))
    assert pages_of(engine).used == len(pages_of(engine).holders.nonzero()[0]) == 4 * 3 + 32


def test_the_bound_changes_nothing_that_is_sampled(policy: Policy) -> None:
    """As many at once as fit if each got as long as it may; and never more pages than there may be."""
    sampling, longest = Sampling(1.0, STOP), 6 * PAGE
    free = play(TransformersEngine(policy), long_conversations(policy), sampling)
    for at_once in (1, 2, 3):
        engine = TransformersEngine(policy, bound=Bound(gigabytes(policy, 6 * at_once + 0.5), longest))
        episodes = long_conversations(policy)
        bounded = play(engine, episodes, sampling)
        assert 2 * PAGE < max(len(episode.ids) for episode in episodes) <= longest
        assert pages_of(engine).limit == 6 * at_once >= len(pages_of(engine).holders)
        for ours, theirs in zip(bounded, free, strict=True):
            for (_, answer), (_, other) in zip(ours, theirs, strict=True):
                assert answer.ids == other.ids
                np.testing.assert_allclose(answer.logprob, other.logprob, atol=1e-4)


def test_requests_wait_until_there_is_room(policy: Policy) -> None:
    taken = ended = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for number in range(6):
            assert taken - ended < 2
            taken += 1
            yield Request([40 + number] * 9, np.full(3 + number, 0.5))

    def follow(number: int, answer: Any) -> None:
        nonlocal ended
        ended += 1

    engine = TransformersEngine(policy, bound=Bound(gigabytes(policy, 2.5), PAGE))
    assert len(engine.generate(requests(), Sampling(1.0, STOP), follow)) == taken == ended == 6


def test_what_has_been_idle_longest_makes_room(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pages, an episode each: the fourth takes that of the first, which is begun anew; the third is continued."""
    engine, draws = TransformersEngine(policy, 8, bound=Bound(gigabytes(policy, 3.5), PAGE)), np.array([0.3, 0.6])
    prompts = [[40 + number] * 9 for number in range(4)]
    said = [engine.generate([Request(prompt, draws)], Sampling(1.0, STOP))[0].ids for prompt in prompts]
    cost = []
    with passes(monkeypatch) as lengths:
        for number in (2, 0):
            lengths.clear()
            engine.generate([Request([*prompts[number], *said[number], 60], draws)], Sampling(1.0, STOP))
            cost.append(sum(lengths))
    assert cost == [3, 9 + 2 + 1 + 1]


def test_an_episode_that_does_not_fit_is_refused_before_anything_runs(policy: Policy) -> None:
    config = scripted_config({"cache_gigabytes": 1e-6})
    with pytest.raises(UserError) as error:
        make_engine(config, policy)
    message = str(error.value)
    assert "\n" not in message
    longest = max(section.context_tokens for section in config.environments.values())
    assert message.startswith("rollout.cache_gigabytes: 1e-06 GB hold keys and values of 0 tokens")
    assert f"an episode may have {longest} (context_tokens)" in message
    enough = float(message.split("at least ")[1].split()[0])
    make_engine(scripted_config({"cache_gigabytes": enough}), policy)


def test_an_episode_longer_than_the_engine_was_told_is_refused(policy: Policy) -> None:
    engine = TransformersEngine(policy, bound=Bound(gigabytes(policy, 1.5), PAGE))
    with pytest.raises(ValueError, match="an episode of 70 tokens"):
        engine.generate([Request([40] * 70, np.array([0.5]))], Sampling(1.0, STOP))
    assert engine.generate([Request([41] * 20, np.array([0.5]))], Sampling(1.0, STOP))[0].ids


def test_pages_are_no_more_than_are_asked_for(policy: Policy) -> None:
    engine = TransformersEngine(policy, 128)
    play(engine, conversations(policy), Sampling(1.0, STOP))
    assert len(pages_of(engine).holders) == 16, "six short episodes take what is made first"
