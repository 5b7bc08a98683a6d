"""Train a sweep's best and its baselines on fresh seeds and compare them on test states."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from pipeline.commands.command import configured, out_folder, parse_arguments, run


def main() -> str:
    arguments = parse_arguments(__doc__, "study")
    config = configured(arguments)
    from pipeline.progress.display import still
    from pipeline.sweep.confirm import confirmation, confirmation_text
    from pipeline.sweep.plan import plans
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import read_json, write_text
    from pipeline.workspace.processes import end_with_parent
    from pipeline.workspace.yaml_files import yaml_text

    study, out = arguments.study, Path(config.out)
    found = plans(arguments.params, study, out / "models" / "policy")
    summary = out / "reports" / "sweep" / study / "summary.json"
    if not summary.exists():
        raise UserError(f"{summary}: no such file; `make sweep STUDY={study}` makes it")
    folder = out / "sweeps" / f"confirm_{study}"
    raw = confirmation(found, read_json(summary)["searches"], folder.as_posix(), os.path.relpath(".", folder))
    write_text(folder / "params.yaml", f"# Made by `make sweep-confirm STUDY={study}`.\n{yaml_text(raw)}")
    pipeline = folder / "dvc.yaml"
    write_text(pipeline, Path("dvc.yaml").read_text(encoding="utf-8"))
    with still():  # the stages speak for themselves
        done = subprocess.run(["dvc", "repro", str(pipeline)], preexec_fn=partial(end_with_parent, signal.SIGKILL))
    if done.returncode:
        sys.exit(done.returncode)
    reports = folder / "reports"
    text = confirmation_text(read_json(reports / "comparison.json"))
    write_text(reports / "verdict.txt", text + "\n")
    shown = out_folder(config) / reports.relative_to(out)
    return f"{(reports / 'comparison.txt').read_text(encoding='utf-8')}\n{text}\n{shown}: verdict.txt, index.html. Next: open index.html"


if __name__ == "__main__":
    run(main)
