"""How fast this machine runs the pipeline, and how far that is from what it could: ``make bench``.

Writes reports/bench.json and reports/bench.png. One thread unless a line says otherwise: that is how the pipeline trains,
one process per core. Repeated figures are medians with their extremes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.language_model import language_model
from benchmarks.machine import machine, peaks
from benchmarks.memory import memory
from benchmarks.subjects import default_setup
from benchmarks.throughput import headline, on_gpu, scaling
from benchmarks.timing import Unmeasured, run_sections
from benchmarks.trainings import trl, whole_training
from pipeline.settings.presets import resolve_preset
from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.yaml_files import LARGEST_LOCK, read_yaml


def dvc_cost(repeats: int = 2) -> dict[str, Any]:
    """The smoke preset's stages through ``dvc repro`` and called one after another, in turn."""
    resolve_preset("smoke", Path("."))
    lock = Path("presets/smoke/dvc.lock")
    through = ["dvc", "repro", "--quiet", "--force", "presets/smoke/dvc.yaml"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    subprocess.run(through, **quiet)  # type: ignore[call-overload]
    commands = [stage["cmd"] for stage in read_yaml(lock, LARGEST_LOCK)["stages"].values()]
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
        "language_model": language_model,
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
