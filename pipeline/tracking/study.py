"""A sweep's runs: a parent run per study, and a nested run per trial, whatever its state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.tracking.patience import HURRIED
from pipeline.tracking.snapshot import Snapshot, log_snapshot
from pipeline.tracking.spool import Spool, now, run_record
from pipeline.tracking.training import Store, flatten
from pipeline.workspace.layout import Cache

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
"""MLflow's status of a trial's run, by the trial's state."""


@dataclass(frozen=True)
class StudyRun:
    """The parent run of a study. Workers on several machines that name it alike share it."""

    store: Store
    experiment: str
    """The environment's name."""
    name: str
    tags: Mapping[str, str]

    @property
    def identity(self) -> dict[str, str]:
        """Tags by which the run is found."""
        return {"kind": "study", "study": self.name}

    @property
    def folder(self) -> Path:
        """Where the trials' records are kept."""
        return Cache(self.store.cache).tracking / "-".join([self.experiment, *self.identity.values()])


def log_study(study: StudyRun, metrics: Mapping[str, float], files: Sequence[tuple[str, Path]] = ()) -> None:
    """Bring a study's run up to date: headline numbers, and files with their folder in the run."""
    snapshot = Snapshot(study.experiment, study.name, study.identity, study.tags, metrics, files=files)
    log_snapshot(study.store, snapshot)


def log_trial(
    study: StudyRun,
    number: int,
    state: Literal["COMPLETE", "PRUNED", "FAIL"],
    params: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    tags: Mapping[str, str],
    started: int | None = None,
) -> None:
    """Log a trial that has ended; one that was logged before is not logged again.

    Args:
        study: the run that the trial's is nested in.
        number: of the trial in its study.
        state: in Optuna's words; the tag ``state`` has it, the run's status follows from it (``STATUS``).
        params: what was tried, nested or dotted keys.
        rows: one per iteration, each with ``iteration`` and metrics.
        tags: further ones, e.g. ``retry_of``.
        started: time in ms since 1970.
    """
    from pipeline.tracking.send import Sender  # imports mlflow, which takes seconds

    spool, time = Spool(study.folder / f"trial-{number}"), now()
    if not spool.records:
        spool.append(
            run_record(
                study.experiment,
                f"{study.name} trial {number}",
                {"kind": "trial", "study": study.name, "trial": str(number)},
                {"name": study.name, "identity": study.identity},
                started or time,
            ),
            {"kind": "tags", "values": {**study.tags, **tags, "state": state}},
            {"kind": "params", "values": flatten(dict(params))},
            *(
                {
                    "kind": "metrics",
                    "values": {key: value for key, value in row.items() if key != "iteration"},
                    "step": int(row["iteration"]),
                    "time": time + index,
                }
                for index, row in enumerate(rows)
            ),
            {"kind": "end", "status": STATUS[state], "time": time + len(rows)},
        )
    Sender(spool, study.store.uri, study.store.cache).send(HURRIED)
