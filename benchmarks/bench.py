"""How fast this machine runs the pipeline, and how far that is from what it could: ``make bench``.

Writes reports/bench.json and reports/bench.png. One thread unless a line says otherwise: that is how the pipeline trains,
one process per core. Repeated figures are medians with their extremes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from benchmarks.baselines import GenerateEngine, padded_scores
from benchmarks.flops import forward_flops, sampling_flops
from pipeline.energy.annotate import annotate
from pipeline.model.kernels.library import library
from pipeline.model.loading import load_trained
from pipeline.model.policy import Policy
from pipeline.model.scoring import length_batches, predicting_hidden, score_tokens
from pipeline.model.trunk import Attend, Heads, packed_attention, padded_attention
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Request, Sampling
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config, load
from pipeline.settings.presets import resolve_preset
from pipeline.training.result import table_slice
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import Trajectories, TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.processes import Tell, run_in_processes
from pipeline.workspace.yaml_files import read_yaml

REPEATS = 5
ENVIRONMENT = "frozen_lake"
SHAPES = {"0.2 M": (64, 2, 4), "1.1 M": (128, 4, 4), "3 M": (256, 4, 8), "20 M": (512, 6, 8)}
"""Hidden size, layers, heads."""


@dataclass(frozen=True)
class Setup:
    """What is measured on."""

    config: Config
    policy_directory: Path
    table: Path
    device: torch.device
    dtype: torch.dtype

    def policy(self) -> Policy:
        return load_trained(self.policy_directory, self.config)

    def scratch(self, hidden: int, layers: int, heads: int, context: int = 4096) -> Policy:
        """A random Qwen2 of another size with the policy's tokenizer."""
        tokenizer = self.policy().tokenizer
        torch.manual_seed(0)
        shape = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        model: Any = Qwen2ForCausalLM(shape)
        return Policy(model.to(self.device, self.dtype).eval(), tokenizer)

    def episodes(self) -> Trajectories:
        """The annotated episodes of the first seed's first iteration."""
        found = table_slice(read(self.table), self.config, ENVIRONMENT, 0)
        assert found is not None
        return found


class Unmeasured(Exception):
    """A section cannot be measured here; the text says why."""


def say(text: str) -> None:
    """Where the benchmark is, also when its output is a file."""
    print(f"bench {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what runs longer, with its worker processes.

    Raises:
        Unmeasured: it did, or there was no time to begin with.
    """

    def stop(*_: Any) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        raise Unmeasured(f"not done in the {seconds:.0f} seconds that were left")

    if seconds <= 0:
        raise Unmeasured("no time was left")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def repeated(work: Callable[[], Any], repeats: int = REPEATS, warm: int = 1) -> list[float]:
    """Seconds of each repetition, after ``warm`` that do not count."""
    seconds = []
    for _ in range(warm + repeats):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[warm:]


def spread(values: list[float]) -> dict[str, Any]:
    """Median and extremes."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "n": len(values)}


def rates(amount: float, seconds: list[float]) -> dict[str, Any]:
    """``amount`` per second."""
    return spread([amount / s for s in seconds])


PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (512, 512, 128), (4096, 256, 1024))
"""Rows, inner size and columns of the products that are tried for the CPU's peak."""


def matrix_peak(
    threads: int, dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int, int]] = PRODUCTS
) -> dict[str, Any]:
    """FLOP/s of matrix products, the best of several shapes and repetitions: a peak is not an average."""
    torch.set_num_threads(threads)
    best = {}
    for m, k, n in shapes:
        a, b = torch.randn(m, k).to(device, dtype), torch.randn(k, n).to(device, dtype)
        calls = max(1, int(2e9 / (2 * m * k * n))) if device.type == "cpu" else 1
        seconds = repeated(lambda a=a, b=b, calls=calls: [a @ b for _ in range(calls)], 7, warm=2)  # type: ignore[misc]
        best[f"{m} x {k} x {n}"] = 2.0 * m * k * n * calls / min(seconds)
    torch.set_num_threads(1)
    return {"peak": max(best.values()), "by_shape": best}


def peaks() -> dict[str, Any]:
    """Of one and two threads of the CPU; ``skipped`` says why where the processor does not multiply a precision.

    A product in bfloat16 that PyTorch has to do number by number takes hundreds of times as long as in float32.
    """
    cpu, found = torch.device("cpu"), dict[str, Any]()
    small = {dtype: min(_product_seconds(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, seconds in small.items():
        slower, name = seconds / small[torch.float32], str(dtype).removeprefix("torch.")
        for threads in (1, 2):
            key = f"{name}, {threads} thread{'s' * (threads > 1)}"
            if slower > 8:
                found[key] = {"skipped": f"a product takes {slower:,.0f} times as long as in float32"}
            else:
                found[key] = matrix_peak(threads, dtype, cpu)
    return found


def _product_seconds(dtype: torch.dtype, size: int = 256) -> list[float]:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return repeated(lambda: a @ b, 3)


def pieces(episodes: Trajectories) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and masks of sampled tokens, episode by episode."""
    spans = [slice(a, b) for a, b in zip(episodes.offsets[:-1], episodes.offsets[1:], strict=True)]
    return [episodes.input_ids[s] for s in spans], [episodes.sampled[s] for s in spans]


def synthetic(policy: Policy, count: int, length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random sequences, of which the later half of every 40 tokens is to be predicted."""
    draws = np.random.default_rng(0)
    ids = [draws.integers(0, len(policy.tokenizer), length).astype(np.int32) for _ in range(count)]
    return ids, [np.arange(length) % 40 >= 20] * count


def update(policy: Policy, ids: list[np.ndarray], wanted: list[np.ndarray], budget: int, padded: bool = False) -> None:
    """Forward and backward passes over minibatches of 32 sequences and an Adam step for each."""
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-6)
    order = np.random.default_rng(0).permutation(len(ids))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        groups = [chosen] if padded else [chosen[b] for b in length_batches([len(ids[i]) for i in chosen], budget)]
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


def training_task(setup: Setup, method: str, iterations: int, folder: Path) -> Any:
    """A real training with tracking and checkpoints, in a folder of its own."""
    from pipeline.tracking.store import open_store, run_settings, store_of
    from pipeline.training.result import training_task as task_of
    from pipeline.training.run import TrainingJob

    config = setup.config
    config = config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"iterations": iterations, "tokens": None, "validate_every": 10 * iterations}
            ),
            "tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"}),
        }
    )
    open_store(store_of(config, folder), ENVIRONMENT)
    task = task_of(config, ENVIRONMENT, method, 0, setup.policy_directory, folder)
    made_from = {"annotated episodes": setup.table, "reference policy": setup.policy_directory}
    return TrainingJob(task, setup.table, run_settings(config, folder, ENVIRONMENT, method, made_from)[0])


def train(job: Any, report: Tell) -> list[dict[str, float]]:
    """Train; returns what each iteration took."""
    from pipeline.training.run import train_one

    result = train_one(job, report)
    timings = json.loads((result / "timings.json").read_text())
    curves = json.loads((result / "curves.json").read_text())
    return [
        {**timing, "tokens": row["tokens"], "all_trained": row["kept_trajectories"] == row["episodes"]}
        for timing, row in zip(timings, curves, strict=True)
    ]


def whole_training(setup: Setup, methods: list[str], iterations: int = 9) -> dict[str, Any]:
    """Seconds by phase, and generated tokens per second of wall time, tracking and all; methods side by side.

    Trained tokens per second are of the update phase, and of all but generation, which is what TRL's side measures; a
    method that leaves episodes out has none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {}
        for number, method in enumerate(methods):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            jobs[f"{number} {method}"] = training_task(setup, method, iterations, folder)
        rows = run_in_processes(train, jobs, len(methods), "train")
    result: dict[str, Any] = {}
    for label, found in rows.items():
        # The first iteration's episodes come from the table; what follows an iteration is counted in the next one's phases.
        phases = sorted({k for row in found for k in row if k.startswith("seconds_")} - {"seconds_validation"})
        later = found[2:]
        seconds = [sum(row.get(p, 0.0) for p in phases) for row in later]
        housekeeping = ("seconds_tracking", "seconds_checkpoint", "seconds_progress")
        after = [sum(row.get(p, 0.0) for p in housekeeping) for row in later]
        steps = np.diff([row["seconds"] for row in found])[1:]
        wall = [float(step) + a for step, a in zip(steps, after, strict=True)]
        result[label] = {
            "seconds_per_iteration": spread(wall),
            "phases": {
                p.removeprefix("seconds_"): spread([row.get(p, 0.0) for row in found[2:]]) for p in sorted(phases)
            },
            "covered_by_phases": float(sum(seconds) / sum(wall)),
            "share_of_weights": float(sum(r.get("seconds_weights", 0.0) for r in later) / sum(wall)),
            "share_of_annotation": float(sum(r.get("seconds_annotate", 0.0) for r in later) / sum(wall)),
            "share_of_tracking_checkpoint_progress": float(sum(after) / sum(wall)),
            "generated_tokens_per_second": spread([r["tokens"] / w for r, w in zip(later, wall, strict=True)]),
        }
        if all(row["all_trained"] for row in later):
            result[label] |= {
                "trained_tokens_per_second_of_update": spread([r["tokens"] / r["seconds_update"] for r in later]),
                "trained_tokens_per_second_outside_generation": spread(
                    [
                        r["tokens"] / (w - sum(r[f"seconds_{phase}"] for phase in ("collect", "reset", "step")))
                        for r, w in zip(later, wall, strict=True)
                    ]
                ),
            }
    return result


def trl(setup: Setup, python: Path, params: Path) -> dict[str, Any]:
    """TRL's trainings, one by one; the fastest again with two threads, and twice at once."""

    def start(configuration: str, threads: int, iterations: int, out: Path) -> subprocess.Popen[bytes]:
        command = [python, "benchmarks/trl_peer.py", "--configuration", configuration, "--threads", str(threads)]
        command += [
            "--params",
            params,
            "--policy",
            setup.policy_directory,
            "--iterations",
            str(iterations),
            "--out",
            out,
        ]
        environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)
        begun.callback(process.kill)
        return process

    def rates_of(out: Path) -> dict[str, Any]:
        found = json.loads(out.read_text())
        rows = [row for row in found["iterations"] if not row["warmup"]]
        return {
            "versions": found["versions"],
            "seconds_per_iteration": spread([row["wall_seconds"] for row in rows]),
            "generation_seconds": spread([row["generation_seconds"] for row in rows]),
            "update_seconds": spread([row["update_seconds"] for row in rows]),
            "generated_tokens_per_second": spread([row["sampled_tokens"] / row["wall_seconds"] for row in rows]),
            "trained_tokens_per_second_of_update": spread([r["trained_tokens"] / r["update_seconds"] for r in rows]),
        }

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as begun:
        result = {}
        for configuration, warm in (("plain", 1), ("cached", 1), ("compiled", 2)):
            out = Path(scratch) / f"{configuration}.json"
            if start(configuration, 1, REPEATS + warm, out).wait() == 0:
                result[configuration] = rates_of(out)
        if not result:
            raise Unmeasured("none of TRL's configurations ran")
        best = max(result, key=lambda name: result[name]["generated_tokens_per_second"]["median"])
        out = Path(scratch) / "threads.json"
        start(best, 2, REPEATS + 2, out).wait()
        result[f"{best}, two threads"] = rates_of(out)
        outs = [Path(scratch) / f"pair-{n}.json" for n in range(2)]
        for process in [start(best, 1, REPEATS + 2, out) for out in outs]:
            process.wait()
        result[f"{best}, beside another"] = rates_of(outs[0])
        return {"best": best, **result}


def dvc_cost(repeats: int = 2) -> dict[str, Any]:
    """The smoke preset's stages through ``dvc repro`` and called one after another, in turn."""
    resolve_preset("smoke", Path("."))
    lock = Path("presets/smoke/dvc.lock")
    through = ["dvc", "repro", "--quiet", "--force", "presets/smoke/dvc.yaml"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    subprocess.run(through, **quiet)  # type: ignore[call-overload]
    commands = [stage["cmd"] for stage in read_yaml(lock)["stages"].values()]
    rounds: dict[str, list[float]] = {"dvc": [], "commands": []}
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(through, **quiet)  # type: ignore[call-overload]
        rounds["dvc"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for command in commands:
            subprocess.run([sys.executable, *command.split()[1:]], **quiet)  # type: ignore[call-overload]
        rounds["commands"].append(time.perf_counter() - began)
    began = time.perf_counter()
    subprocess.run(["dvc", "repro", "--quiet", "presets/smoke/dvc.yaml"], **quiet)  # type: ignore[call-overload]
    nothing = time.perf_counter() - began
    cost = min(rounds["dvc"]) - min(rounds["commands"])
    return {**rounds, "stages": len(commands), "seconds_per_stage": cost / len(commands), "nothing_to_do": nothing}


def headline(setup: Setup) -> dict[str, Any]:
    """The default workload on one core: our figures, their floors, and what plain transformers does."""
    policy, episodes, budget = setup.policy(), setup.episodes(), setup.config.train.tokens_per_forward
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
    default, budget = setup.policy(), setup.config.train.tokens_per_forward
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


def memory(setup: Setup) -> dict[str, float]:
    """Resident megabytes at their highest, in processes that do one thing each."""
    result = {}
    for name in ("import", "rollout", "update"):
        code = f"from benchmarks.bench import peak_of; peak_of({name!r}, {str(setup.policy_directory.parents[1])!r})"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        result[name] = float(found.stdout.split()[-1])
    return result


def peak_of(name: str, out: str) -> None:
    """Do one thing and print the process's highest resident megabytes."""
    torch.set_num_threads(1)
    setup = default_setup(Path("params.yaml"), Layout(Path(out)), "cpu")
    if name == "rollout":
        rollout_rates(setup, 128, 128, 1)
    if name == "update":
        update(setup.policy(), *pieces(setup.episodes()), setup.config.train.tokens_per_forward)
    # Not getrusage: its highest mark begins with the process that started this one.
    marks = Path("/proc/self/status").read_text().split("VmHWM:")
    print(int(marks[1].split()[0]) / 1024 if len(marks) > 1 else float("nan"))


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


def default_setup(params: Path, layout: Layout, device: str) -> Setup:
    """The reference policy and table that ``make repro`` has made."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Setup(load(params), layout.policy, layout.annotated(ENVIRONMENT), torch.device(device), dtype)


def machine() -> dict[str, Any]:
    """What figures are of."""
    loaded = library()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "kernels": "off" if loaded is None else loaded.instruction_set,
    }


def processor() -> str:
    """As Linux calls it, with family and model, which a virtual machine's name leaves out."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    except OSError:
        lines = []
    words = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    name = words.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {words['cpu family']}, model {words['model']})" if "cpu family" in words else name


def run_sections(
    found: dict[str, Any], sections: Mapping[str, Callable[[], Any]], seconds: float, keep: Callable[[], None]
) -> None:
    """Measure one section after another into ``found``; what cannot be measured is left out with a word in ``skipped``.

    Args:
        found: sections by name, ``seconds`` that each took, ``skipped`` ones with the reason.
        sections: by name.
        seconds: for all of them.
        keep: called after each.

    Raises:
        UserError: there is nothing to measure on.
        TrajectoryError: likewise.
    """
    deadline = time.monotonic() + seconds
    for number, (name, section) in enumerate(sections.items(), 1):
        at, began = f"{number}/{len(sections)} {name}", time.monotonic()
        say(at)
        found.pop(name, None)
        found["skipped"].pop(name, None)
        try:
            with limited(deadline - began):
                found[name] = section()
        except (UserError, TrajectoryError):
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, Unmeasured) else f"{type(error).__name__}: {error}"
            found["skipped"][name] = reason.split("\n")[0]
            say(f"{at}: skipped, {found['skipped'][name]}")
        found["seconds"][name] = time.monotonic() - began
        keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on cuda only the large model is measured")
    parser.add_argument("--trl", type=Path, help="python of TRL's environment; without it TRL is left out")
    parser.add_argument("--only", help="comma-separated sections")
    parser.add_argument("--minutes", type=float, default=20.0, help="what is not measured by then is skipped")
    parser.add_argument("--out", type=Path, default=Path("reports/bench.json"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    setup = default_setup(arguments.params, Layout(Path(".")), arguments.device)

    def trl_section() -> dict[str, Any]:
        if arguments.trl is None:
            raise Unmeasured("no --trl was given")
        return trl(setup, arguments.trl, arguments.params)

    sections: dict[str, Callable[[], Any]] = {
        "peaks": peaks,
        "headline": lambda: headline(setup),
        "training": lambda: whole_training(setup, ["grpo"]),
        "training_two_at_once": lambda: whole_training(setup, ["grpo", "grpo_actfocus"]),
        "trl": trl_section,
        "scaling": lambda: scaling(setup),
        "memory_megabytes": lambda: memory(setup),
        "dvc": dvc_cost,
    }
    if arguments.device != "cpu":
        sections = {"gpu": lambda: on_gpu(setup)}
    if arguments.only:
        sections = {name: sections[name] for name in arguments.only.split(",")}
    found: dict[str, Any] = {"machine": machine(), "seconds": {}, "skipped": {}}
    if arguments.out.exists() and (arguments.only or arguments.device != "cpu"):
        before = json.loads(arguments.out.read_text())
        if before["machine"] == found["machine"]:  # figures of two machines or builds do not stand in one table
            found |= before
    run_sections(found, sections, 60 * arguments.minutes, lambda: write_json(arguments.out, found))
    from benchmarks.report import bench_figure, bench_text

    text = bench_text(found)
    if "headline" in found and "peaks" in found:
        bench_figure(found).savefig(arguments.out.with_suffix(".png"), dpi=110)
        arguments.out.with_suffix(".txt").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (UserError, TrajectoryError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
