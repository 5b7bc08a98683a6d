"""Running trainings: resumable, each in a process of its own, finished results kept by key."""

import logging
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback

from pipeline.model.adapters import save_trained
from pipeline.model.loading import load_trained
from pipeline.model.policy import Policy
from pipeline.progress.display import begin, within
from pipeline.sources.hashes import tree_hashes
from pipeline.tracking.training import RunSettings, TrainingRun
from pipeline.training.budget import progress, training_over
from pipeline.training.callbacks import Checkpoint, Clock, End, Log, Progress, Validation, Watch
from pipeline.training.checkpoints import drop, pass_over, sound
from pipeline.training.module import PolicyGradient
from pipeline.training.seed_key import TrainingTask, table_slice
from pipeline.training.team import ALONE, Team, join, require_room, trainer_settings
from pipeline.trajectories.parquet import copy_parquet
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import TrajectoryError, require_known_ids
from pipeline.workspace.files import lock, read_json, replacing, write_json
from pipeline.workspace.finite import located
from pipeline.workspace.layout import Layout
from pipeline.workspace.processes import Tell, run_together
from pipeline.workspace.stopping import stop_if_asked

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
    keeps_policy: bool = True
    """Whether the result has the trained policy; the learning curve may be all that is asked for."""


def train_one(job: TrainingJob, report: Tell) -> Path:
    """Train one seed, or go on where it was killed; returns the folder of its result."""
    train_until(job, job.task.config.train.iterations, report)
    return job.task.result


def train_until(job: TrainingJob, iterations: int, report: Tell) -> Curve:
    """Train one seed for so many of its iterations, or go on where it stopped; returns its learning curve so far.

    It stops with a checkpoint; the result appears with the training's last iteration (see ``training_over``). Where another
    process does the same training, this one waits and goes on from there.

    Raises:
        Stopped: it was asked to stop, and has with a checkpoint of the iteration that was at work.
    """
    waiting = partial(within, 0.0, "waiting for another command, which does this training", insist=True)
    with nullcontext() if job.task.finished else lock(job.task.cache / "lock", waiting=waiting):
        return _train_until(job, iterations, report)


def _train_until(job: TrainingJob, iterations: int, report: Tell) -> Curve:
    """See ``train_until``; nobody else works on this training."""
    task, train = job.task, job.task.config.train
    if task.finished:
        curve: Curve = read_json(task.result / "curves.json")
        return curve[:iterations]
    checkpoint, saved = _last(task)
    over = training_over(saved, train)
    if len(saved) >= iterations and not over:
        return saved[:iterations]
    stop_if_asked()
    begin(*progress(saved, train))
    task.cache.mkdir(parents=True, exist_ok=True)
    most = len(saved) if over else iterations  # killed after its last iteration, it has none to make
    plan, meeting = train.processes, task.cache / "meeting"
    if plan.number == 1:
        return _train(job, most, report, ALONE, checkpoint)[:iterations]
    require_room(task.config)
    meeting.unlink(missing_ok=True)
    try:
        together = run_together(
            lambda rank: _train(job, most, report, join(rank, plan, meeting), checkpoint), plan.number
        )
        return together[:iterations]
    finally:
        meeting.unlink(missing_ok=True)


def _last(task: TrainingTask) -> tuple[Path | None, Curve]:
    """The checkpoint that a training goes on from, if there is one, and the curve so far.

    One behind the last iteration is none without that iteration's episodes, which are in a file of their own.
    """
    for checkpoint in sound(task.cache):
        curve: Curve = torch.load(checkpoint, mmap=True, weights_only=True)["curve"]
        if not training_over(curve, task.config.train):
            return checkpoint, curve
        try:
            read(task.cache / "episodes.parquet")
            return checkpoint, curve
        except TrajectoryError as error:
            pass_over(checkpoint, str(error))
    return None, []


def _train(job: TrainingJob, iterations: int, report: Tell, team: Team, checkpoint: Path | None) -> Curve:
    """What one process of a training does, from a checkpoint on or from the start; returns its learning curve."""
    task, first = job.task, None
    within(0.0, "loading the policy", insist=True)
    policy = load_trained(task.policy, task.config)
    if job.table is not None and checkpoint is None:
        table = read(job.table)
        require_known_ids(table, policy.model.get_input_embeddings().weight.shape[0])
        first = table_slice(table, task.config, task.environment, task.seed)
    module = PolicyGradient(task.config, task.environment, task.method, task.seed, policy, first, team)
    run = TrainingRun(job.tracking, task.cache) if job.tracking is not None and team.first else None
    own = [Progress(report), *([Log(run)] if run else [])] if team.first else []
    trainer = make_trainer(
        task.cache, iterations, [Clock(), Validation(), Watch(), *own, Checkpoint(task.cache), End()], team
    )
    with located(f"{task.environment}-{task.method}, seed {task.seed}"):
        _fit(trainer, module, ckpt_path=checkpoint, weights_only=True)
    if training_over(module.curve, task.config.train):
        trained = module.result()
        if team.first:
            _leave_result(job, module, trained, run)
            drop(task.cache)
    elif len(module.curve) < iterations:
        stop_if_asked()
    return module.curve


def try_iteration(module: PolicyGradient) -> dict[str, float]:
    """Make a training's first iteration, which leaves no file; returns its row of the curve, with its times."""
    with TemporaryDirectory() as folder:
        _fit(make_trainer(Path(folder), 1, [Clock()]), module)
    return module.curve[0]


def _fit(trainer: lightning.Trainer, module: PolicyGradient, **options: Any) -> None:
    """``Trainer.fit``, which makes an exit with code 1 of a signal that has ended the work: that stays what it was."""
    try:
        trainer.fit(module, **options)
    except SystemExit as end:
        raise end.__context__ if isinstance(end.__context__, KeyboardInterrupt) else end from None


def make_trainer(folder: Path, iterations: int, callbacks: list[Callback], team: Team = ALONE) -> lightning.Trainer:
    """Lightning's trainer of one process of a training; what it may leave of its own goes to a folder."""
    # Lightning's hints about hardware and loggers are not for this pipeline's users.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # An iteration in which no group is kept has no optimizer step before the scheduler's; that is as it should be.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
    return lightning.Trainer(
        accelerator="auto",
        max_epochs=iterations,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **trainer_settings(team),
    )


def _leave_result(job: TrainingJob, module: PolicyGradient, trained: Policy, run: TrainingRun | None) -> None:
    """Write what a finished training leaves, and make it appear at once; the curve then has no times."""
    task = job.task
    episodes = task.cache / "episodes.parquet"
    timings = [
        {k: row.pop(k) for k in list(row) if k.startswith(("seconds", "tokens_per_second"))} for row in module.curve
    ]
    with replacing(task.result) as folder:
        if job.keeps_policy:
            save_trained(trained, folder / "policy", Layout(Path()).base)
        write_json(folder / "curves.json", module.curve)
        write_json(folder / "timings.json", timings)
        copy_parquet(episodes, folder / episodes.name)
        if run is not None:
            # Killed after its last iteration, a training has none in memory.
            last = module.last_episodes or read(episodes)
            write_json(folder / "runs.json", run.finish(module.policy.tokenizer, last))
        write_json(task.manifest, tree_hashes(folder))
    episodes.unlink(missing_ok=True)
