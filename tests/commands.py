"""Stages as a user calls them, but for the seconds that each takes to import what it needs: that is done once for all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKED = """
import importlib.util, json, os, runpy, sys, tempfile
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # as every stage begins
import transformers.models.auto.modeling_auto
import pipeline.report.html, pipeline.tracking.store, pipeline.training.run

results = []
for stage, *options in json.load(sys.stdin):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        command = [] if importlib.util.find_spec(f"stages.{stage}") else [stage]
        sys.argv = [stage, *command, *options]
        runpy.run_module("pipeline.commands.app" if command else f"stages.{stage}", run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(os.pread(file.fileno(), 10**6, 0).decode() for file in (out, err))])
print(json.dumps(results))
"""


def complaints(stderr: str) -> list[str]:
    """Lines on standard error but for those that tell how far a stage is: on a slow machine one comes before a mistake."""
    return [line for line in stderr.splitlines() if " so far" not in line]


def forked_stages(
    folder: Path, environment: Mapping[str, str], *commands: Sequence[str]
) -> list[subprocess.CompletedProcess[str]]:
    """``python -m stages.<command>``, or else ``actfocus <command>``, one after another, each in a process forked from one.

    Args:
        folder: where they run; their code is there or on the environment's PYTHONPATH.
        environment: variables.
        commands: the name of a stage, or of a command, and its options each.
    """
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        input=json.dumps(commands),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300 * len(commands),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    return [subprocess.CompletedProcess(c, *result) for c, result in zip(commands, results, strict=True)]
