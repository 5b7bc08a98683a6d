"""The same training by TRL: ``GRPOTrainer`` on this project's episodes, timed iteration by iteration.

Environment, dialogue, limits, penalties, states and noise come from the project (``collect`` on ``iteration_specs``), so
that the episodes are the same. Sampling is transformers' ``generate`` in TRL's ``rollout_func`` hook; advantages,
reference, loss and optimizer are TRL's own, set to the project's ``grpo``. TRL has an environment of its own:

    python3.11 -m venv .venv-trl && .venv-trl/bin/pip install -r benchmarks/trl_requirements.txt
    PYTHONPATH=. .venv-trl/bin/python benchmarks/trl_peer.py --configuration cached --out trl.json

Three things differ and cannot be set: TRL adds 1e-4 to a group's standard deviation (the project 1e-6); it computes the
log-probabilities of the sampling policy again, because it samples once for several optimizer steps; and it pads all of an
iteration's minibatches to the longest episode. The project's entropy bonus (0.001) is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental, and says so

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from pipeline.model.loading import load_policy
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.params import Config, load
from pipeline.trajectories.parsing import END_OF_RESPONSE

CONFIGURATIONS = {
    "plain": "model.generate once a turn on the active episodes' whole dialogues, left-padded, with a fresh dynamic cache",
    "cached": "model.generate once a turn on the active episodes; the KV cache lasts from turn to turn, and a group's "
    "prompt passes through the model once",
    "compiled": "as cached, and the trainer's torch_compile for the update (about two iterations are spent compiling)",
}
"""On a CPU, eager attention doubles the update's time, and continuous batching (``generate_batch``), whose attention is
dense over all rows of the paged cache, takes 6 to 20 times as long to generate as ``cached``; neither is offered."""
WARMUP = {"plain": 1, "cached": 1, "compiled": 2}
"""Iterations that are marked as warm-up: a second shape makes torch compile once more, for any shape."""


class Engine:
    """A ``RolloutEngine`` that samples with transformers' own loop; draws are torch's, not the requests' uniforms.

    A response ends at a token, which is cheaper than a text: ``END_OF_RESPONSE`` must be one entry of the vocabulary.
    """

    policy_version = 0

    def __init__(self, trainer: GRPOTrainer, tokenizer: Any, cached: bool) -> None:
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        stop = tokenizer.encode(END_OF_RESPONSE, add_special_tokens=False)
        if len(stop) != 1:
            raise SystemExit(f"trl_peer: {END_OF_RESPONSE} must be one token, got {stop}")
        self.stop, self.ends, self.pad = stop[0], {stop[0], *trainer.eos_token_ids}, tokenizer.pad_token_id
        self.settings: GenerationConfig = copy.deepcopy(trainer.generation_config)
        self.settings.eos_token_id = sorted(self.ends)
        self.sample = self._cached if cached else self._plain
        self.forget()

    def sync(self, policy: Any, version: int) -> None:
        """The trainer's weights are read at every call."""
        self.forget()
        self.policy_version = version

    def forget(self) -> None:
        """Drop the cache."""
        self.cache: Any = None
        self.ids = self.mask = torch.zeros((0, 0), dtype=torch.long)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        """See ``RolloutEngine.generate``; all episodes take a turn together, and those that are over drop out."""
        if sampling.temperature != self.settings.temperature:
            raise ValueError("the trainer samples at another temperature")
        self.forget()
        active = dict(enumerate(requests))
        rows = list(range(len(active)))
        answers: dict[int, Continuation] = {}
        while active:
            self.settings.max_new_tokens = max(len(request.uniforms) for request in active.values())
            sampled = self.sample(list(active.values()), rows)
            turn = {number: self._cut(*pair) for number, *pair in zip(active, active.values(), sampled, strict=True)}
            answers |= turn
            following = {number: follow(number, answer) if follow else None for number, answer in turn.items()}
            rows = [row for row, request in enumerate(following.values()) if request is not None]
            active = {number: request for number, request in following.items() if request is not None}
        return [answers[number] for number in sorted(answers)]

    def _cut(self, request: Request, row: list[int]) -> Continuation:
        """A row up to its first end token or the request's limit; log-probabilities and entropies are not needed."""
        limit = min(len(request.uniforms), len(row))
        length = next((i + 1 for i, token in enumerate(row[:limit]) if token in self.ends), limit)
        last, nothing = row[length - 1], [0.0] * length
        finish = "stop" if last == self.stop else "eos" if last in self.ends else "length"
        return Continuation(row[:length], nothing, nothing, finish, self.policy_version)

    def _plain(self, requests: list[Request], rows: list[int]) -> list[list[int]]:
        ids, mask = self._padded([request.ids for request in requests])
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.settings)
        return output[:, ids.shape[1] :].tolist()

    def _cached(self, requests: list[Request], rows: list[int]) -> list[list[int]]:
        """``rows`` of the turn before go on. What follows a row's end is a hole that the attention mask hides."""
        if self.cache is None:
            ids, mask = self._padded([request.ids for request in requests])
            self._prefill(ids[:, :-1], mask[:, :-1])
        else:
            if len(rows) < len(self.ids):
                self.cache.batch_select_indices(torch.tensor(rows))
            before, seen = self.ids[rows], self.mask[rows]
            known = seen.sum(-1).tolist()
            ids, mask = self._padded([request.ids[n:] for request, n in zip(requests, known, strict=True)])
            ids, mask = torch.cat([before, ids], 1), torch.cat([seen, mask], 1)
        self.ids = self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=self.cache, generation_config=self.settings
        )
        sampled = self.ids[:, ids.shape[1] :].tolist()
        lengths = torch.tensor([len(self._cut(*pair).ids) for pair in zip(requests, sampled, strict=True)])
        spoken = torch.arange(self.ids.shape[1] - ids.shape[1]) < lengths.unsqueeze(1)
        self.mask = torch.cat([mask, spoken.long()], 1)
        return sampled

    @torch.no_grad()
    def _prefill(self, ids: Tensor, mask: Tensor) -> None:
        """Fill a new cache; equal rows pass through the model once."""
        self.cache = DynamicCache(config=self.model.config)
        distinct, rows = torch.unique(torch.stack([ids, mask], 1), dim=0, return_inverse=True)
        ids, mask = distinct.unbind(1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
        )
        self.cache.batch_select_indices(rows)

    def _padded(self, rows: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, padded on the left."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask


class Clock(TrainerCallback):
    """Measures iterations from end to end: the first starts with the training, each other where the last one ended."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup, self.optimizer_steps = steps, warmup, 0
        self.rows: list[dict[str, Any]] = []
        self.current: dict[str, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer_steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps:
            return
        now = time.perf_counter()
        wall, self.started = now - self.started, now
        row = {
            "iteration": len(self.rows),
            "warmup": len(self.rows) < self.warmup,
            "wall_seconds": wall,
            "update_seconds": wall - self.current["generation_seconds"],
            **self.current,
            "optimizer_steps": self.optimizer_steps,
        }
        self.rows.append(row)
        self.optimizer_steps = 0
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), file=sys.stderr)


def settings(config: Config, options: argparse.Namespace, out: str) -> GRPOConfig:
    """The project's ``grpo`` in TRL's words, and nothing that would only cost time."""
    method = config.methods["grpo"]
    episodes, minibatch = config.rollout.groups * config.rollout.group_size, config.train.minibatch
    return GRPOConfig(
        output_dir=out,
        max_steps=options.iterations * config.train.passes * (episodes // minibatch),
        per_device_train_batch_size=minibatch,
        generation_batch_size=episodes,
        num_generations=config.rollout.group_size,
        num_iterations=config.train.passes,
        gradient_accumulation_steps=1,
        temperature=config.rollout.temperature,
        beta=method.regulariser.kl,
        use_bias_correction_kl=False,
        epsilon=method.surrogate.low,
        epsilon_high=method.surrogate.high,
        loss_type="bnpo",  # the minibatch's token mean
        scale_rewards="group",
        learning_rate=method.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,  # AdamW without decay is Adam
        adam_beta1=config.train.betas[0],
        adam_beta2=config.train.betas[1],
        max_grad_norm=config.train.gradient_clip,
        seed=options.seed,
        shuffle_dataset=False,
        use_cpu=True,
        torch_compile=options.configuration == "compiled",
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def rollout(config: Config, options: argparse.Namespace, tokenizer: Any, clock: Clock) -> Callable[..., Any]:
    """TRL's hook: plays the iteration's episodes; whatever the policy did not sample is masked out of the loss."""
    engine: Engine | None = None

    def play(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        nonlocal engine
        started = time.perf_counter()
        engine = engine or Engine(trainer, tokenizer, cached=options.configuration != "plain")
        specs = iteration_specs(config, options.environment, options.seed, len(clock.rows))
        if prompts != [spec.group_id for spec in specs]:
            raise RuntimeError("TRL asks for other episodes than this iteration's")
        played = collect(engine, tokenizer, config, options.environment, specs, config.rollout.temperature)
        spans = [slice(a, b) for a, b in zip(played.offsets[:-1], played.offsets[1:], strict=True)]
        ids, sampled = ([column[span].tolist() for span in spans] for column in (played.input_ids, played.sampled))
        first = [mask.index(True) for mask in sampled]
        masks = [list(map(int, mask[n:])) for mask, n in zip(sampled, first, strict=True)]
        clock.current = {
            "generation_seconds": time.perf_counter() - started,
            "episodes": len(specs),
            "turns": len(played.turns["valid"]),
            "sampled_tokens": int(played.sampled.sum()),
            "trained_tokens": sum(map(sum, masks)),
            "return": float(played.returns.mean()),
            "success": sum(played.episodes["success"]) / len(specs),
            "valid_action_rate": sum(played.turns["valid"]) / len(played.turns["valid"]),
        }
        return {
            "prompt_ids": [row[:n] for row, n in zip(ids, first, strict=True)],
            "completion_ids": [row[n:] for row, n in zip(ids, first, strict=True)],
            "logprobs": None,
            "env_mask": masks,
            "episode_return": played.returns.tolist(),
        }

    return play


def episode_return(episode_return: list[float], **_: Any) -> list[float]:
    """TRL's reward: what ``rollout`` returned under this name."""
    return episode_return


def main() -> None:
    """Train, and write one row per iteration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--policy", default="models/policy")
    parser.add_argument("--environment", default="frozen_lake")
    parser.add_argument("--configuration", choices=CONFIGURATIONS, required=True)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()

    config = load(options.params)
    policy = load_policy(Path(options.policy).absolute())
    groups = [
        spec.group_id
        for iteration in range(options.iterations)
        for spec in iteration_specs(config, options.environment, options.seed, iteration)[:: config.rollout.group_size]
    ]
    with tempfile.TemporaryDirectory() as scratch:
        args = settings(config, options, scratch)
        clock = Clock(args.max_steps // options.iterations, WARMUP[options.configuration])
        trainer = GRPOTrainer(
            model=policy.model,
            processing_class=policy.tokenizer,
            reward_funcs=episode_return,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": groups}),
            rollout_func=rollout(config, options, policy.tokenizer, clock),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    result = {
        "configuration": options.configuration,
        "description": CONFIGURATIONS[options.configuration],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")},
        "threads": options.threads,
        "iterations": clock.rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
