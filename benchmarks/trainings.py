"""Whole trainings, ours and TRL's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subjects import ENVIRONMENT, Setup
from benchmarks.timing import REPEATS, Unmeasured, spread
from pipeline.workspace.processes import Tell, run_in_processes


def training_task(setup: Setup, method: str, iterations: int, folder: Path) -> Any:
    """A real training with tracking and checkpoints, in a folder of its own."""
    from pipeline.tracking.store import open_store, run_settings, store_of
    from pipeline.training.run import TrainingJob
    from pipeline.training.seed_key import training_task as task_of

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
        command += ["--params", params, "--policy", setup.policy_directory]
        command += ["--iterations", str(iterations), "--out", out]
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
