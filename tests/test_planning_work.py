"""What is counted of an iteration: against hand calculations, PyTorch's counter, the engine, and the memory it takes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden
from pipeline.planning.flops import cached_flops, forward_flops, head_flops, reading_flops
from pipeline.planning.lengths import Lengths, longest_lengths, sampled_lengths
from pipeline.planning.memory import OPTIMIZER, cache_bytes, held, page_bytes, sizes
from pipeline.planning.shapes import KNOWN, Shape, shape_of
from pipeline.planning.work import PlannedIteration, Work, engine_steps, forward_work, readings, sampling_work
from pipeline.rollout.collector import collect
from pipeline.rollout.key_value_cache import PAGE, SlotCache
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.lora import Lora
from pipeline.settings.method import Method
from pipeline.workspace.errors import UserError
from tests.trainings import LAKE, configured

SMALL = Qwen2Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)


def small(width: int = 32) -> Shape:
    config = copy.deepcopy(SMALL)
    config.hidden_size, config.head_dim = width, width // 4
    return Shape("small", config, torch.float32)


def written_out() -> Any:
    """A model whose attention is matrix products, which PyTorch counts; its own attention it does not, on a processor."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(copy.deepcopy(SMALL)).eval()
    model.set_attn_implementation("eager")
    return model


def lengths(prompt: list[int], whole: list[int], sampled: list[int], group: list[int]) -> Lengths:
    columns = (np.array(column) for column in (prompt, whole, sampled))
    return Lengths(*columns, np.ones(len(whole), dtype=np.int64), np.array(group), 2.0)


def test_a_forward_pass_is_as_many_operations_as_pytorch_counts() -> None:
    """All tokens are wanted, so that nothing is left out; PyTorch counts a causal score matrix whole, we its lower half."""
    model, length = written_out(), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], use_cache=False)
    config, heads, size = SMALL, 4, 8
    whole = 4 * heads * size * config.num_hidden_layers * length * length
    half = 4 * heads * size * config.num_hidden_layers * length * (length + 1) // 2
    ours = cached_flops(config, length, length * (length + 1) / 2, length)
    assert counter.get_total_flops() - whole == ours - half


def test_a_backward_pass_is_two_forward_passes_as_pytorch_counts() -> None:
    model = written_out()
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.arange(24)[None], use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_readings_are_those_of_whole_sequences_where_nothing_is_shared() -> None:
    own = lengths([3, 4], [9, 7], [6, 3], [0, 1])
    (read,) = readings(small(), own, [np.arange(9), np.arange(7)], np.arange(2), 64)
    wanted = [np.arange(9) >= 3, np.arange(7) >= 4]
    assert read.pairs == 45 + 28
    assert reading_flops(small().config, read) == forward_flops(small().config, [9, 7], wanted)


def test_a_shared_prompt_is_read_once_from_the_width_on_from_which_it_pays() -> None:
    own = lengths([20] * 4, [26] * 4, [6] * 4, [0, 0, 1, 1])
    config = configured({"rollout": {"groups": 2, "group_size": 2}, "train": {"minibatch": 2}})

    def computed(width: int) -> float:
        iteration = PlannedIteration(config, "grpo", small(width), own, 4, 4096)
        return sum(read.tokens for read in iteration.reading(range(4)))

    assert computed(128) == 4 * 26
    assert computed(256) == 2 * 20 + 4 * 6


def test_what_the_model_computes_is_what_readings_say() -> None:
    """The packed forward pass itself, counted by PyTorch: its linear maps are those of the tokens that are computed."""
    torch.manual_seed(0)
    shape = small(256)
    model = Qwen2ForCausalLM(shape.config).eval()
    own = lengths([20] * 4, [26] * 4, [6] * 4, [0, 0, 1, 1])
    rows = [np.r_[np.full(20, group), np.arange(10 + 6 * e, 16 + 6 * e)] for e, group in enumerate((0, 0, 1, 1))]
    (read,) = readings(shape, own, rows, np.arange(4), 4096)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        predicting_hidden(Policy(model, None), rows, [np.arange(26) >= 20] * 4)
    counted = sum(n for name, n in counter.get_flop_counts()["Global"].items() if str(name) == "aten.mm")
    counted += sum(n for name, n in counter.get_flop_counts()["Global"].items() if str(name) == "aten.addmm")
    size = 256 // 4
    per_pair = 4 * 4 * size
    attention = per_pair * (2 * read.pairs + read.wanted_pairs)
    linear = reading_flops(shape.config, read) - attention - head_flops(shape.config, read.wanted)
    shared = 2  # one token of each prompt predicts the first ones of two episodes
    once = shared * 2 * (2 * 256 * 256 + 3 * 256 * 48)
    assert counted == linear - once


def test_weights_are_read_once_a_forward_pass_and_activations_by_token() -> None:
    shape = small()
    read = readings(shape, lengths([3], [9], [6], [0]), [np.arange(9)], np.arange(1), 64)[0]
    layer = 4 * 32 + 2 * 32 + 2 * 16 + 3 * 48
    work = forward_work(shape, read, 4)
    assert work.bytes == 4 * shape.parameters + 2 * 4 * 9 * 3 * layer + 8 * 6 * 96
    assert (work.layers, work.tokens) == (4, 9)


@given(
    st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=30), st.integers(min_value=1, max_value=12)
)
def test_steps_lie_between_what_must_be_and_what_one_slot_would_take(sampled: list[int], slots: int) -> None:
    steps = engine_steps(np.array(sampled), slots)
    assert max(max(sampled), -(-sum(sampled) // slots)) <= steps <= sum(sampled)
    assert engine_steps(np.array(sampled), 1) == sum(sampled)
    assert engine_steps(np.array(sampled), len(sampled)) == max(sampled)


def test_the_engine_takes_as_many_steps_and_computes_as_many_tokens_as_are_counted(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured({"rollout": {"groups": 2, "group_size": 4, "batch_episodes": 3}})
    engine, steps = TransformersEngine(policy, 3), list[int]()
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda active: (steps.append(len(active)), step(active))[1])
    episodes = collect(engine, policy.tokenizer, config, LAKE, iteration_specs(config, LAKE, 0, 0), 1.0)
    own = sampled_lengths(episodes)
    shape = Shape("tiny", policy.model.config, torch.float32)
    assert engine_steps(own.sampled, 3) == len(steps)
    prefill, decoding = sampling_work(shape, own, 3)
    # What is sampled last is read by nobody; what slots have lost of a prompt is computed again.
    computed = engine.positions_computed + len(own)
    assert prefill.tokens + decoding.tokens == pytest.approx(computed, rel=0.1)
    assert own.sampled.sum() == episodes.sampled.sum()
    assert own.turns.sum() == len(episodes.turns["start"])


def test_sampling_reads_the_weights_at_every_step_and_keys_and_values_of_what_was_before() -> None:
    shape, own = small(), lengths([4, 4], [7, 7], [3, 3], [0, 0])
    prefill, decoding = sampling_work(shape, own, 2)
    layer = 4 * 32 + 2 * 32 + 2 * 16 + 3 * 48
    attended = 2 * (5 + 6 + 7)  # of each sampled token, itself among them
    expected = 3 * 4 * shape.parameters + attended * 4 * shape.token_numbers + 2 * 4 * 3 * layer * 6 + 8 * 6 * 96
    assert decoding.bytes == expected
    assert (prefill.tokens, decoding.tokens, decoding.layers) == (4, 6, 3 * 4)
    assert prefill.flops + decoding.flops == cached_flops(shape.config, 4 + 6, 10 + attended, 6)


def test_an_update_is_three_forward_passes_and_what_is_computed_again() -> None:
    config = configured({"rollout": {"groups": 2, "group_size": 2}, "train": {"minibatch": 2, "passes": 1}})
    own = lengths([5] * 4, [11] * 4, [6] * 4, [0, 0, 1, 1])
    plain = PlannedIteration(config, "grpo", small(), own, 4, 4096)
    update = plain.counted()["update"]
    passes = Work().plus(*(plain.forward(chosen, 4) for chosen in plain.minibatches()))
    assert update.flops == 3 * passes.flops + head_flops(small().config, 24)
    assert update.bytes == 3 * passes.bytes + 2 * small().parameters * 48
    again = replace(plain, recomputes=True).counted()["update"]
    assert again.flops - update.flops == passes.flops
    critic = replace(plain, method="ppo").counted()
    assert critic["values"].flops == plain.forward(range(4), 4).flops
    assert plain.counted()["values"] == Work()


def test_a_first_iteration_scores_everything_twice() -> None:
    config = configured({"rollout": {"groups": 2, "group_size": 2}, "train": {"minibatch": 2}})
    plain = PlannedIteration(config, "grpo", small(), lengths([5] * 4, [11] * 4, [6] * 4, [0, 0, 1, 1]), 4, 4096)
    once = plain.forward(range(4), 4).flops
    assert replace(plain, number=0).counted()["annotation"].flops == 2 * once
    assert plain.counted()["annotation"].flops == 1.5 * once  # one of 64, at least one, and the longest


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
    ],
)
def test_known_models_have_the_parameters_that_their_publishers_say(name: str, parameters: int) -> None:
    config = configured({"policy": {"kind": "pretrained", "model": f"{name}-Instruct", "dtype": "bfloat16"}})
    shape = shape_of(config)
    assert shape.parameters == parameters
    assert shape.dtype == torch.bfloat16
    assert name in KNOWN


def test_a_policy_from_scratch_has_the_shape_that_is_made_of_its_settings(policy: Policy) -> None:
    shape, made = shape_of(configured()), policy.model.config
    width, fewer = made.hidden_size, configured().policy.vocabulary - made.vocab_size  # type: ignore[union-attr]
    assert shape.parameters == policy.model.num_parameters() + width * fewer
    assert shape.token_numbers == 2 * width


def test_adapters_are_counted_as_rank_rows_and_columns() -> None:
    shape = Shape("small", SMALL, torch.float32, Lora(rank=2, targets=["q_proj", "down_proj"]))
    assert shape.trained == 3 * 2 * ((32 + 32) + (32 + 48))


def test_a_model_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^policy: \./nowhere: no such model directory$") as error:
        shape_of(configured(), "./nowhere")
    assert "\n" not in str(error.value)


def test_pages_are_those_of_the_cache() -> None:
    cache = SlotCache(SMALL, 2, torch.device("cpu"), torch.float32)
    assert page_bytes(small()) == pytest.approx(1e9 * cache._page_gigabytes)


def test_a_groups_prompt_is_held_once_in_whole_pages() -> None:
    own = lengths([PAGE + 3] * 3, [3 * PAGE] * 3, [9] * 3, [0, 0, 1])
    assert cache_bytes(small(), own, 3) == (2 + 3 * 2) * page_bytes(small())
    assert cache_bytes(small(), own, 1) == 3 * page_bytes(small())


def test_memory_is_weights_gradients_moments_reference_cache_and_activations() -> None:
    config = configured()
    shape, own = small(), lengths([5] * 4, [11] * 4, [6] * 4, [0, 0, 1, 1])
    iteration = PlannedIteration(config, "grpo", shape, own, 4, 4096)
    holding, weights = held(iteration), shape.parameters
    assert holding.both["weights"] == 4 * weights
    assert holding.both["gradients and Adam's moments"] == OPTIMIZER * weights
    assert holding.both["reference policy"] == holding.sampling["weights to sample from"] == 4 * weights
    assert "weights to sample from" not in holding.both
    half = replace(iteration, shape=Shape("small", SMALL, torch.bfloat16))
    assert held(half).both["weights to sample from"] == 2 * weights
    shared = held(iteration, 4).training
    assert shared["weights"] == weights
    assert shared["activations and logits"] == holding.training["activations and logits"]
    critic = config.model_copy(update={"methods": {"ppo": _own_trunk(config.methods["ppo"])}})
    assert held(replace(iteration, config=critic, method="ppo")).both["networks beside the policy"] == 16 * weights


def _own_trunk(method: Method) -> Method:
    """The method with a critic that has a trunk of its own."""
    advantage: Any = method.advantage
    critic = advantage.critic.model_copy(update={"kind": "model"})
    return method.model_copy(update={"advantage": advantage.model_copy(update={"critic": critic})})


def test_sizes_follow_the_memory_and_a_device_too_small_is_one_line() -> None:
    config = configured({"train": {"tokens_per_forward": "auto"}})
    shape = small()
    large, little = (sizes(config, LAKE, shape, memory, False, 1) for memory in (1e12, 2e7))
    assert large.slots == config.rollout.batch_episodes
    assert little.budget < large.budget
    assert (little.recomputes, large.recomputes) == (False, False)
    with pytest.raises(UserError, match=r"^rollout\.cache_gigabytes: .*; allowed: .* or more$"):
        sizes(config, LAKE, shape, 1e5, False, 1)


def test_the_longest_episodes_fill_the_context() -> None:
    own = longest_lengths(configured(), LAKE)  # 4 turns of 20 tokens in 400
    assert set(own.whole) == {400}
    assert set(own.sampled) == {80}
    assert set(own.prompt) == {80}
    assert own.spread == 0
