"""Memory of processes that do one thing each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.subjects import Setup, default_setup, pieces
from benchmarks.throughput import rollout_rates, update
from pipeline.model.memory import tokens_per_forward
from pipeline.workspace.layout import Layout


def memory(setup: Setup) -> dict[str, float]:
    """Resident megabytes at their highest, in processes that do one thing each."""
    result = {}
    for name in ("import", "rollout", "update"):
        code = f"from benchmarks.memory import peak_of; peak_of({name!r}, {str(setup.policy_directory.parents[1])!r})"
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
        policy = setup.policy()
        update(policy, *pieces(setup.episodes()), tokens_per_forward(setup.config, policy))
    # Not getrusage: its highest mark begins with the process that started this one.
    marks = Path("/proc/self/status").read_text().split("VmHWM:")
    print(int(marks[1].split()[0]) / 1024 if len(marks) > 1 else float("nan"))
