"""Rollout, annotation, update and attention: tokens and floating-point operations per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import GenerateEngine, padded_scores
from benchmarks.machine import matrix_peak
from benchmarks.subjects import ENVIRONMENT, SHAPES, Setup, pieces, synthetic
from benchmarks.timing import REPEATS, rates, repeated, say, spread
from pipeline.energy.annotate import annotate
from pipeline.model.attention import Attend, Heads, packed_attention, padded_attention
from pipeline.model.memory import tokens_per_forward
from pipeline.model.policy import Policy
from pipeline.model.scoring import batches_of, predicting_hidden, score_tokens
from pipeline.planning.flops import forward_flops, sampling_flops
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Request, Sampling
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.trajectories.trajectory import Trajectories


def update(policy: Policy, ids: list[np.ndarray], wanted: list[np.ndarray], budget: int, padded: bool = False) -> None:
    """Forward and backward passes over minibatches of 32 sequences and an Adam step for each."""
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-6)
    order = np.random.default_rng(0).permutation(len(ids))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        groups = [chosen] if padded else [chosen[b] for b in batches_of(policy, [ids[i] for i in chosen], budget)]
        total = sum(int(wanted[i].sum()) for i in chosen)
        for group in groups:
            sequences, masks = [ids[i] for i in group], [wanted[i] for i in group]
            if padded:
                logprob, entropy = padded_scores(policy, sequences, masks)
            else:
                tokens = np.concatenate([s[m] for s, m in zip(sequences, masks, strict=True)]).astype(np.int64)
                hidden = predicting_hidden(policy, sequences, masks)
                scores = score_tokens(hidden, torch.from_numpy(tokens).to(policy.device), policy.head, 1.0)
                logprob, entropy = scores.logprob, scores.entropy
            ((-logprob - 0.001 * entropy).sum() / total).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def update_rates(
    policy: Policy, ids: list[np.ndarray], wanted: list[np.ndarray], budget: int, repeats: int = REPEATS
) -> dict[str, Any]:
    """Tokens per second, and useful FLOP/s."""
    policy.model.train()
    seconds = repeated(lambda: update(policy, ids, wanted, budget), repeats)
    flops = 3 * forward_flops(policy.model.config, [len(s) for s in ids], wanted)
    return {
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "tokens_per_second": rates(sum(map(len, ids)), seconds),
        "flops_per_second": rates(flops, seconds),
    }


def rollout_rates(setup: Setup, slots: int, episodes: int, repeats: int, engine: Any = None, turns: int = 0) -> Any:
    """Tokens and episodes per second of playing the reference policy's first iteration, or more of it."""
    config = setup.config
    if turns:
        section = config.environments[ENVIRONMENT].model_copy(update={"max_turns": turns})
        config = config.model_copy(update={"environments": {ENVIRONMENT: section}})
    groups = -(-episodes // config.rollout.group_size)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"groups": groups})})
    policy = setup.policy()
    engine = engine(policy) if engine else TransformersEngine(policy, slots)
    specs = iteration_specs(config, ENVIRONMENT, 0, 0)[:episodes]
    played: list[Trajectories] = []
    seconds = repeated(
        lambda: played.append(collect(engine, policy.tokenizer, config, ENVIRONMENT, specs, 1.0)), repeats
    )
    last = played[-1]
    sampled = [int(p.sampled.sum()) for p in played[1:]]
    prompts = [int(mask.sum()) for mask in np.split(last.role == 0, last.offsets[1:-1])]
    flops = sampling_flops(policy.model.config, prompts[:: config.rollout.group_size], list(last.lengths), sampled[-1])
    return {
        "slots": slots,
        "tokens_per_second": spread([n / s for n, s in zip(sampled, seconds, strict=True)]),
        "episodes_per_second": rates(len(specs), seconds),
        "flops_per_second": rates(flops, seconds),
    }


def by_turn(setup: Setup, turns: int = 10, reply: int = 24, observation: int = 20) -> dict[str, Any]:
    """Microseconds per token of each turn of a long dialogue, and the line fitted to turns 2 to 10.

    Attention makes it grow linearly with the context; the line says whether it does, not how little it could.
    """
    engine = TransformersEngine(setup.policy(), 128)
    best = np.minimum.reduce([_turn_seconds(engine, turns, reply, observation) for _ in range(REPEATS)])
    per_token = best / (128 * reply)
    context = 30 + np.arange(turns) * (reply + observation) + reply / 2
    slope, intercept = np.polyfit(context[1:], per_token[1:], 1)
    fitted = intercept + slope * context
    return {
        "microseconds_per_token": (per_token * 1e6).tolist(),
        "context": context.tolist(),
        "line": (fitted * 1e6).tolist(),
        "largest_departure_turns_2_to_10": float(np.abs(per_token / fitted - 1)[1:].max()),
    }


def _turn_seconds(engine: TransformersEngine, turns: int, reply: int, observation: int) -> np.ndarray:
    engine.forget()
    stamps, spoken = [time.perf_counter()], [0] * 128
    prefixes = [[1 + i % 300] * 30 for i in range(128)]

    def follow(number: int, answer: Continuation) -> Request | None:
        spoken[number] += 1
        if min(spoken) == len(stamps):
            stamps.append(time.perf_counter())
        prefixes[number] = [*prefixes[number], *answer.ids, *[5] * observation]
        return None if spoken[number] == turns else Request(prefixes[number], np.full(reply, 0.37))

    requests = [Request(prefix, np.full(reply, 0.37)) for prefix in prefixes]
    engine.generate(requests, Sampling(1.0, "\x00never"), follow)
    return np.diff(stamps)


def attention(setup: Setup) -> dict[int, Any]:
    """Microseconds a token and layer of causal attention, forward and backward: the kernel and PyTorch's."""
    result = {}
    for length in (160, 640, 2048):
        count = max(1, 4096 // length)
        q, k, v, slope = torch.randn(4, count * length, 4, 16).unbind()
        tensors = [x.contiguous().requires_grad_() for x in (q, k, v)]
        both = {
            "kernel": packed_attention([length] * count, setup.device),
            "pytorch": padded_attention(np.full(count, length), setup.device),
        }
        result[length] = {
            name: spread([s * 1e6 / len(q) for s in repeated(_attention_step(attend, tensors, slope), 7)])
            for name, attend in both.items()
        }
    return result


def _attention_step(attend: Attend, tensors: list[torch.Tensor], slope: torch.Tensor) -> Callable[[], Any]:
    q, k, v = tensors
    return lambda: torch.autograd.grad(attend(0, Heads(q, k, v, None, 0.25)), tensors, slope)


def headline(setup: Setup) -> dict[str, Any]:
    """The default workload on one core: our figures, their floors, and what plain transformers does."""
    policy, episodes = setup.policy(), setup.episodes()
    budget = tokens_per_forward(setup.config, policy)
    ids, wanted = pieces(episodes)
    baseline = repeated(lambda: update(policy, ids, wanted, budget, padded=True), REPEATS)
    seconds = repeated(lambda: annotate(episodes, policy, 1.0, budget), REPEATS)
    flops = forward_flops(policy.model.config, episodes.lengths, wanted)
    bigger = setup.scratch(*SHAPES["1.1 M"])
    parts: dict[str, Callable[[], Any]] = {
        "rollout": lambda: rollout_rates(setup, 128, 128, REPEATS),
        "rollout_5_turns": lambda: rollout_rates(setup, 128, 128, REPEATS, turns=5),
        "rollout_5_turns_generate": lambda: rollout_rates(setup, 128, 128, REPEATS, GenerateEngine, turns=5),
        "annotation": lambda: {
            "tokens_per_second": rates(len(episodes.input_ids), seconds),
            "flops_per_second": rates(flops, seconds),
        },
        "update": lambda: update_rates(policy, ids, wanted, budget),
        "update_padded_transformers": lambda: {"tokens_per_second": rates(len(episodes.input_ids), baseline)},
        "update_1M": lambda: update_rates(bigger, ids, wanted, budget),
        "by_turn": lambda: by_turn(setup),
        "attention": lambda: attention(setup),
    }
    found = {}
    for name, part in parts.items():
        say(f"headline: {name}")
        found[name] = part()
    return found


def scaling(setup: Setup) -> dict[str, Any]:
    """One axis at a time."""
    default = setup.policy()
    budget = tokens_per_forward(setup.config, default)
    result: dict[str, Any] = {"batch": {}, "context": {}, "model": {}, "threads": {}}
    for slots in (32, 128, 512, 1024):
        result["batch"][slots] = rollout_rates(setup, slots, slots, 3)
    for length in (256, 1024, 4096):
        policy = setup.scratch(64, 2, 4)
        result["context"][length] = update_rates(policy, *synthetic(policy, 16384 // length, length), budget, 3)
    for name, shape in SHAPES.items():
        policy = setup.scratch(*shape)
        count = 64 if name != "20 M" else 16
        result["model"][name] = update_rates(policy, *synthetic(policy, count, 160), budget, 2)
    ids, wanted = pieces(setup.episodes())
    for threads in (1, 2):
        torch.set_num_threads(threads)
        result["threads"][threads] = {
            "update": update_rates(default, ids, wanted, budget, 3),
            "rollout": rollout_rates(setup, 128, 128, 3),
        }
    torch.set_num_threads(1)
    return result


@dataclass(frozen=True)
class Large:
    """What ``on_gpu`` measures; the default is a Qwen2 shape of 0.4 B parameters."""

    shape: tuple[int, int, int] = (1024, 24, 16)
    """Hidden size, layers, heads."""
    product: int = 8192
    """Rows and columns of the matrix product."""
    copied: int = 2**30
    """Bytes."""
    sequences: int = 64
    length: int = 1024
    """Tokens of each sequence of the update."""
    slots: int = 128
    steps: int = 128
    """Tokens sampled in each slot."""


LARGE = Large()


def on_gpu(setup: Setup, large: Large = LARGE) -> dict[str, Any]:
    """Update against the matrix peak, decoding against the time to read the weights (memory copied, both ways)."""
    policy = setup.scratch(*large.shape)
    peak = matrix_peak(1, setup.dtype, setup.device, [(large.product,) * 3])["peak"]
    source = torch.empty(large.copied, dtype=torch.uint8, device=setup.device)
    bandwidth = 2 * large.copied / min(repeated(lambda: source.clone(), 5))
    found = update_rates(policy, *synthetic(policy, large.sequences, large.length), 32768)
    engine, steps = TransformersEngine(policy, large.slots), large.steps
    requests = [Request([1 + i % 300] * 64, np.full(steps, 0.37)) for i in range(large.slots)]

    def decode() -> None:
        engine.forget()
        engine.generate(requests, Sampling(1.0, "\x00never"))

    seconds = repeated(decode, 3)
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    return {
        "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else str(setup.device),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "matrix_peak": peak,
        "bandwidth": bandwidth,
        "update": found,
        "decode_slots": large.slots,
        "decode_tokens_per_second": rates(large.slots * steps, seconds),
        "decode_share_of_weight_reading_floor": rates(steps * weights / bandwidth, seconds),
    }
