"""The runs that trainings have noted in ``data/runs``, which DVC keeps and other stages read."""

from pathlib import Path
from typing import Any

from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_record


def noted_runs(file: Path) -> dict[str, dict[str, Any]]:
    """The run of each seed, as ``TrainingRun.finish`` gives it.

    Raises:
        UserError: the file is not there, or not what a training writes.
    """
    noted = read_record(file)
    seeds = noted.get("seeds") if isinstance(noted, dict) else None
    if not isinstance(seeds, dict) or not all(map(_is_run, seeds.values())):
        raise UserError(f"{file}: not what a training writes; delete it, `dvc repro` makes it again")
    return seeds


def _is_run(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"run_id", "tracking_id"} <= entry.keys():
        return False
    return all(isinstance(value, str | None) for value in entry.values())
