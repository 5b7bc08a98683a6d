"""What happens around each iteration of a training: clock, validation, progress, tracking, checkpoint, the end."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from pipeline.evaluation.evaluate import summary, validate
from pipeline.progress.display import span
from pipeline.settings.alarms import PREFIX
from pipeline.tracking.training import TrainingRun
from pipeline.training.alarms import alarm_text, alarms
from pipeline.training.budget import progress, training_over
from pipeline.training.checkpoints import LAST, saving
from pipeline.training.module import PolicyGradient
from pipeline.trajectories.table import write
from pipeline.workspace.faults import writing
from pipeline.workspace.finite import located, require_finite
from pipeline.workspace.processes import Tell
from pipeline.workspace.stopping import asked


class Clock(Callback):
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


class Validation(Callback):
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
        done = len(module.curve)
        after, place = float(done > module.current_epoch), f"validation after {done} iterations"
        with module.phases.phase("validation"), span("validation:", after, after), located(place):
            module.engine.sync(module.policy, done)
            shared = module.engine, module.policy.tokenizer, module.config, module.name, module.seed
            return summary(module.team.gathered(validate(*shared, module.team.own_rows)))


class Watch(Callback):
    """Says in an iteration's row of which alarms it is one; it is whole by then."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        found = alarms(pl_module.curve, pl_module.config)
        pl_module.curve[-1] |= {f"{PREFIX}{name}": value for name, value in found.items()}


class Progress(Callback):
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
        if alarmed := alarm_text(pl_module.curve):
            text = f"ALARM: {alarmed}; {text}"
        with pl_module.phases.phase("progress"):
            self._report(*progress(pl_module.curve, plan), text)


class Log(Callback):
    """Sends each iteration's metrics to MLflow in one call; what has been alarmed of is a tag."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed training has all its iterations in MLflow, whatever has become of their records."""
        for count in range(1, len(pl_module.curve) + 1):
            self._log(pl_module.curve[:count], earlier=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with pl_module.phases.phase("tracking"):
            self._log(pl_module.curve)

    def _log(self, curve: Sequence[Mapping[str, float]], earlier: bool = False) -> None:
        row = dict(curve[-1])
        for name in ("episodes", "tokens"):
            row[f"{name}_total"] = sum(before[name] for before in curve)
        alarmed = alarm_text(curve)
        self._run.log(row, int(row.pop("iteration")), {"alarms": alarmed} if alarmed else {}, earlier)


class Checkpoint(Callback):
    """Saves after every iteration, and keeps the checkpoint before (``checkpoints.saving``); counts iterations begun in begun.log.

    Of several processes the first one writes, and all take part in the checkpoint. The last iteration's episodes are kept before its checkpoint says that the training is over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.team.first:
            begun = self._folder / "begun.log"
            with writing(begun), begun.open("a", encoding="utf-8") as log:
                log.write(f"{trainer.current_epoch}\n")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.team.first and pl_module.last_update:
            write(pl_module.last_episodes, self._folder / "episodes.parquet", pl_module.last_update)
        with (
            pl_module.phases.phase("checkpoint"),
            saving(self._folder) if pl_module.team.first else nullcontext(self._folder / LAST) as partial,
        ):
            trainer.save_checkpoint(partial)


class End(Callback):
    """Ends a training whose tokens are spent, or that was asked to stop: all its processes after the same iteration."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        stopped = pl_module.team.summed({"asked": float(asked())})["asked"]
        trainer.should_stop = training_over(pl_module.curve, pl_module.config.train) or stopped > 0
