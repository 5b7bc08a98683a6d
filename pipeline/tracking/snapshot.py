"""A parent run: what a comparison or a study has come to, written as a whole each time."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.tracking.patience import PATIENT
from pipeline.tracking.spool import Record, Spool, now, run_record
from pipeline.tracking.training import Store
from pipeline.workspace.layout import Cache


@dataclass(frozen=True)
class Snapshot:
    """The state of a parent run."""

    experiment: str
    name: str
    identity: Mapping[str, str]
    """Tags by which the run is found; its name in the cache, too."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)
    """Small files by their paths in the run."""
    files: Sequence[tuple[str, Path]] = ()
    """Folder in the run, and a file, which is sent as it is when the store is there."""
    champion: Record | None = None
    """See ``champion.py``."""


def log_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Bring a parent run up to date. One that is up to date stays as it is."""
    from pipeline.tracking.send import Sender  # imports mlflow, which takes seconds

    spool = Spool(Cache(store.cache).tracking / "-".join([snapshot.experiment, *snapshot.identity.values()]))
    earlier = spool.records
    records = _records(snapshot, earlier)
    if _content(records) != _content(earlier):
        spool.replace(records)
    Sender(spool, store.uri, store.cache).send(PATIENT, insist=True)


def _records(snapshot: Snapshot, earlier: Sequence[Record]) -> list[Record]:
    """The snapshot as records. A number that has not changed keeps its time, so that it stays one point to the store."""
    known = {
        (name, value): record["time"]
        for record in earlier
        if record["kind"] == "metrics"
        for name, value in record["values"].items()
    }
    time = now()
    files = [
        {"kind": "file", "path": folder, "source": str(file.resolve()), "digest": _digest(file)}
        for folder, file in snapshot.files
        if file.exists()
    ]
    return [
        run_record(
            snapshot.experiment, snapshot.name, snapshot.identity, None, earlier[0]["time"] if earlier else time
        ),
        {"kind": "tags", "values": dict(snapshot.tags)},
        *(
            {"kind": "metrics", "values": {name: value}, "step": 0, "time": known.get((name, value), time)}
            for name, value in snapshot.metrics.items()
        ),
        *({"kind": "text", "path": path, "text": text} for path, text in snapshot.texts.items()),
        *files,
        *([] if snapshot.champion is None else [{"kind": "champion", **snapshot.champion}]),
        {"kind": "end", "status": "FINISHED", "time": time},
    ]


def _content(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
