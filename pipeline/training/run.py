"""Running trainings: resumable, each in a process of its own, finished results kept by key."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback

from pipeline.evaluation.evaluate import summary, validate
from pipeline.model.loading import load_trained
from pipeline.progress.display import begin, span, within
from pipeline.tracking.training import RunSettings, TrainingRun
from pipeline.training.budget import progress, training_over
from pipeline.training.module import PolicyGradient
from pipeline.training.result import TrainingTask, publish, table_slice
from pipeline.trajectories.table import read, write
from pipeline.workspace.files import lock, read_json, write_json
from pipeline.workspace.finite import located, require_finite
from pipeline.workspace.processes import Tell

Curve = list[dict[str, float]]
"""One row of metrics per finished iteration."""


@dataclass(frozen=True)
class TrainingJob:
    """One training, and what is needed to run it."""

    task: TrainingTask
    table: Path | None
    """Annotated trajectories of the rollout stage, if the first iteration may come from there."""
    tracking: RunSettings | None
    """Where and under which tags MLflow holds the run; None for a training that has no run of its own."""


def train_one(job: TrainingJob, report: Tell) -> Path:
    """Train one seed, or go on where it was killed; returns the folder of its result."""
    train_until(job, job.task.config.train.iterations, report)
    return job.task.result


def train_until(job: TrainingJob, iterations: int, report: Tell) -> Curve:
    """Train one seed for so many of its iterations, or go on where it stopped; returns its learning curve so far.

    It stops with a checkpoint; the result appears with the training's last iteration (see ``training_over``). Where another
    process does the same training, this one waits and goes on from there.
    """
    if not job.task.finished:
        with lock(job.task.cache / "lock", waiting=_waiting):
            return _train_until(job, iterations, report)
    return _train_until(job, iterations, report)


def _waiting() -> None:
    within(0.0, "waiting for another command, which does this training", insist=True)


def _train_until(job: TrainingJob, iterations: int, report: Tell) -> Curve:
    """See ``train_until``; nobody else works on this training."""
    task, table = job.task, job.table
    if task.finished:
        curve: Curve = read_json(task.result / "curves.json")
        return curve[:iterations]
    config, checkpoint = task.config, task.cache / "checkpoint.ckpt"
    saved: Curve = torch.load(checkpoint, mmap=True, weights_only=True)["curve"] if checkpoint.exists() else []
    over = training_over(saved, config.train)
    if len(saved) >= iterations and not over:
        return saved[:iterations]
    begin(*progress(saved, config.train))
    within(0.0, "loading the policy", insist=True)
    _quiet()
    policy = load_trained(task.policy, config)
    first = None
    if table is not None and not checkpoint.exists():
        first = table_slice(read(table), config, task.environment, task.seed)
    module = PolicyGradient(config, task.environment, task.method, task.seed, policy, first)
    task.cache.mkdir(parents=True, exist_ok=True)
    run = None if job.tracking is None else TrainingRun(job.tracking, task.cache)
    tracked = [] if run is None else [_Log(run)]
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=len(saved) if over else iterations,  # killed after its last iteration, it has none to make
        logger=False,
        callbacks=[
            _Clock(),
            _Validation(),
            _Progress(report),
            *tracked,
            _Episodes(task),
            _Checkpoint(task),
            _End(),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=task.cache,
    )
    with located(f"{task.environment}-{task.method}, seed {task.seed}"):
        trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    if not training_over(module.curve, config.train):
        return module.curve

    partial = task.cache / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    module.policy.save(partial / "policy")
    timings = [
        {k: row.pop(k) for k in list(row) if k.startswith(("seconds", "tokens_per_second"))} for row in module.curve
    ]
    write_json(partial / "curves.json", module.curve)
    write_json(partial / "timings.json", timings)
    shutil.copy2(task.cache / "episodes.parquet", partial)
    if run is not None:
        # Killed after its last iteration, a training has none in memory.
        episodes = module.last_episodes or read(task.cache / "episodes.parquet")
        write_json(partial / "runs.json", run.finish(policy.tokenizer, episodes))
    publish(partial, task.result)
    checkpoint.unlink(missing_ok=True)
    (task.cache / "episodes.parquet").unlink(missing_ok=True)
    return module.curve[:iterations]


class _Clock(Callback):
    """Seconds spent in iterations so far (validation left out), tokens sampled per second of each, seconds by phase.

    What happens after an iteration (validation, tracking, checkpoint) is counted in the next one's phases.
    """

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row, spent = pl_module.curve[-1], time.monotonic() - self._began
        earlier = pl_module.curve[-2]["seconds"] if len(pl_module.curve) > 1 else 0.0
        row["seconds"] = earlier + spent
        row["tokens_per_second"] = row["tokens"] / spent
        row |= {f"seconds_{name}": seconds for name, seconds in pl_module.phases.take().items()}


VALIDATED = ("success", "return", "valid_action_rate", "malformed_rate", "cut_rate")
"""Keys of ``summary`` that a validation leaves in its iteration's row, as ``validation_<key>``."""


class _Validation(Callback):
    """Validates before training, every ``validate_every`` iterations and after the last."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._before = self._validate(pl_module) if trainer.current_epoch == 0 else None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        plan, row = pl_module.config.train, pl_module.curve[-1]
        if self._before is not None:
            row["validation_success_before"] = self._before["success"]
        done = int(row["iteration"]) + 1
        if done % plan.validate_every == 0 or training_over(pl_module.curve, plan):
            result = self._validate(pl_module)
            row |= {f"validation_{k}": result[k] for k in VALIDATED}
        for name, value in row.items():
            require_finite(f"iteration {done - 1}: {name}", value)

    def _validate(self, module: PolicyGradient) -> dict[str, float]:
        after, place = (
            float(len(module.curve) > module.current_epoch),
            f"validation after {len(module.curve)} iterations",
        )
        with module.phases.phase("validation"), span("validation:", after, after), located(place):
            played = validate(module.engine, module.policy.tokenizer, module.config, module.name, module.seed)
        return summary(played)


class _Progress(Callback):
    """Reports after every iteration: how many of them, or of the tokens that may be sampled, have been spent."""

    def __init__(self, report: Tell) -> None:
        self._report = report

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        plan, row = pl_module.config.train, pl_module.curve[-1]
        shown = {
            "success": "success",
            "return": "return",
            "entropy": "entropy",
            "KL": "kl_reference",
            "clipped": "clip_fraction",
            "action share": "gradient_share_action",
            "flat groups": "zero_variance_groups",
            "tok/s": "tokens_per_second",
        }
        unit = [] if plan.tokens is None else [f"tokens, iteration {int(row['iteration']) + 1}:"]
        text = " ".join([*unit, *(f"{label} {row[key]:.3g}" for label, key in shown.items() if key in row)])
        with pl_module.phases.phase("progress"):
            self._report(*progress(pl_module.curve, plan), text)


class _Log(Callback):
    """Sends each iteration's metrics to MLflow in one call."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with pl_module.phases.phase("tracking"):
            row = dict(pl_module.curve[-1])
            row |= {
                f"{name}_total": sum(earlier[name] for earlier in pl_module.curve) for name in ("episodes", "tokens")
            }
            self._run.log(row, int(row.pop("iteration")))


class _Episodes(Callback):
    """Keeps the last iteration's episodes, before its checkpoint says that it is over."""

    def __init__(self, task: TrainingTask) -> None:
        self._task = task

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.last_update:
            write(pl_module.last_episodes, self._task.cache / "episodes.parquet", pl_module.last_update)


class _Checkpoint(Callback):
    """Saves after every iteration, replacing the last checkpoint at once; counts iterations begun in begun.log."""

    def __init__(self, task: TrainingTask) -> None:
        self._task = task

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        with open(self._task.cache / "begun.log", "a", encoding="utf-8") as log:
            log.write(f"{trainer.current_epoch}\n")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        partial = self._task.cache / "checkpoint.partial"
        with pl_module.phases.phase("checkpoint"):
            trainer.save_checkpoint(partial)
            os.replace(partial, self._task.cache / "checkpoint.ckpt")


class _End(Callback):
    """Ends a training whose tokens are spent."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = training_over(pl_module.curve, pl_module.config.train)


def _quiet() -> None:
    """Lightning's hints about hardware and loggers are not for this pipeline's users."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # An iteration in which no group is kept has no optimizer step before the scheduler's; that is as it should be.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
