"""Parent runs, of a comparison or a sweep's study, and the nested runs of a study's trials, whatever their states."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.tracking.patience import HURRIED, PATIENT, Patience
from pipeline.tracking.records import Record
from pipeline.tracking.spool import Spool, now, run_record
from pipeline.tracking.training import Store, flatten
from pipeline.workspace.layout import Cache

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
"""MLflow's status of a trial's run, by the trial's state."""


@dataclass(frozen=True)
class ParentRun:
    """A run in which others are nested. Processes on several machines that name it alike share it."""

    store: Store
    experiment: str
    """The environment's name."""
    name: str
    identity: Mapping[str, str]
    """Tags by which the run is found; its name in the cache, too."""
    tags: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where its records are kept, and those of a study's trials."""
        return Cache(self.store.cache).tracking / "-".join([self.experiment, *self.identity.values()])


def log_parent(
    run: ParentRun,
    metrics: Mapping[str, float],
    texts: Mapping[str, str] | None = None,
    files: Sequence[tuple[str, Path]] = (),
    champion: Record | None = None,
) -> None:
    """Bring a parent run up to date, as a whole. One that is up to date stays as it is.

    A number that has not changed keeps its time, so that it stays one point to the store.

    Args:
        run: the parent run.
        metrics: headline numbers.
        texts: small files by their paths in the run.
        files: folder in the run, and a file, which is sent as it is when the store is there.
        champion: see ``champion.py``.
    """
    spool, time = Spool(run.folder), now()
    earlier = spool.records
    known = {
        (name, value): record["time"]
        for record in earlier
        if record["kind"] == "metrics"
        for name, value in record["values"].items()
    }
    began = earlier[0]["time"] if earlier else time
    records = [
        run_record(run.experiment, run.name, run.identity, None, began),
        {"kind": "tags", "values": dict(run.tags)},
        *(
            {"kind": "metrics", "values": {name: value}, "step": 0, "time": known.get((name, value), time)}
            for name, value in metrics.items()
        ),
        *({"kind": "text", "path": path, "text": text} for path, text in (texts or {}).items()),
        *({"kind": "file", "path": folder, **_contents(file)} for folder, file in files if file.exists()),
        *([] if champion is None else [{"kind": "champion", **champion}]),
        {"kind": "end", "status": "FINISHED", "time": time},
    ]
    if _timeless(records) != _timeless(earlier):
        spool.replace(records)
    _send(spool, run.store, PATIENT, insist=True)


def log_trial(
    study: ParentRun,
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
    spool, time = Spool(study.folder / f"trial-{number}"), now()
    if not spool.records:
        name, identity = f"{study.name} trial {number}", {"kind": "trial", "study": study.name, "trial": str(number)}
        parent = {"name": study.name, "identity": study.identity}
        spool.append(
            run_record(study.experiment, name, identity, parent, started or time),
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
    _send(spool, study.store, HURRIED)


def _send(spool: Spool, store: Store, patience: Patience, insist: bool = False) -> None:
    from pipeline.tracking.send import Sender  # imports mlflow, which takes seconds

    Sender(spool, store.uri, store.cache).send(patience, insist)


def _timeless(records: Sequence[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def _contents(file: Path) -> dict[str, str]:
    return {"source": str(file.resolve()), "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
