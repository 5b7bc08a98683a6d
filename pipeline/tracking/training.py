"""One MLflow run per training, written to a spool first: the store may be away at any time (see ``spool.py``).

Lightning's logger is not used: it writes to the store at once, and fails with it.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.tracking.patience import HURRIED
from pipeline.tracking.records import Record
from pipeline.tracking.spool import Spool, now, run_record
from pipeline.tracking.system import SystemMetrics
from pipeline.trajectories.records import episode_records
from pipeline.trajectories.trajectory import Trajectories

EVERY = 5.0
"""Seconds between two times at which a training sends its metrics: one call for many iterations costs hardly more."""


@dataclass(frozen=True)
class Store:
    """Where runs are sent, and where they are kept until then."""

    uri: str = field(repr=False)
    """MLflow's tracking URI, perhaps with a password."""
    cache: Path
    """The project's cache folder."""


@dataclass(frozen=True)
class RunSettings:
    """What a training's run carries."""

    store: Store
    experiment: str
    name: str
    parent: Mapping[str, Any]
    """Name and identity (tags by which it is found) of the run that this one is nested in."""
    tags: dict[str, str]
    params: dict[str, Any]
    """The resolved configuration, flat keys."""
    datasets: list[dict[str, Any]]
    """See ``dataset_inputs``."""
    texts: dict[str, str]
    """Small files by their names in the run."""
    traces: int
    """Episodes stored as traces."""
    episodes: int
    """Episodes stored as text."""


class TrainingRun:
    """The run of one training; a resumed training goes on in its first run, where it stopped.

    Args:
        settings: see ``RunSettings``.
        folder: the training's own; keeps the run's records between a kill and a resumption.
    """

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        from pipeline.tracking.send import Sender  # imports mlflow, which takes seconds

        self._settings, self._spool, self._patience = settings, Spool(folder / "tracking"), HURRIED
        self._sender = Sender(self._spool, settings.store.uri, settings.store.cache)
        self._begin()
        records = self._spool.records
        self._id = str(records[0]["identity"]["tracking.id"])
        self._time: int = max(record.get("time", 0) for record in records)
        self._logged = {record["step"] for record in records if record["kind"] == "metrics"}
        self._ended = records[-1]["kind"] == "end"
        self._system = SystemMetrics()
        self._send()

    def _begin(self) -> None:
        """Have the records with which a run begins, all of them, whatever has been damaged."""
        records, beginning = self._spool.records, _beginning(self._settings)
        if not records or "tracking.id" not in records[0]["identity"]:
            self._spool.replace(beginning)
            return
        there = {(record["kind"], record.get("path")) for record in records}
        missing = [record for record in beginning if (record["kind"], record.get("path")) not in there]
        if missing:
            self._spool.append(*missing)

    def log(
        self, metrics: dict[str, float], iteration: int, tags: Mapping[str, str] | None = None, earlier: bool = False
    ) -> None:
        """All metrics of one iteration, and the machine's, and tags of the run.

        What was logged before a kill is not logged again, nor tags that the run has. Of an ``earlier`` iteration, whose
        record was damaged, the machine's metrics are lost.
        """
        if iteration not in self._logged:
            values = metrics if earlier else metrics | self._system.measure()
            self._spool.append({"kind": "metrics", "values": values, "step": iteration, "time": self._tick()})
            self._logged.add(iteration)
        if tags and {"kind": "tags", "values": dict(tags)} not in self._spool.records:
            self._spool.append({"kind": "tags", "values": dict(tags)})
        if time.monotonic() - self._tried >= EVERY:
            self._send()

    def finish(self, tokenizer: Any, episodes: Trajectories | None) -> dict[str, str | None]:
        """Store sampled episodes, end the run, and say where it is.

        Returns:
            ``tracking_id``, a tag by which the run is found; ``run_id``, None if the store has not been there yet;
            ``experiment``, ``name`` and ``comparison``; ``revision``, the commit whose code it was, see ``store.provenance``.
        """
        if not self._ended:
            if episodes is not None:
                self._spool.append(*self._sample(tokenizer, episodes))
            self._spool.append({"kind": "end", "status": "FINISHED", "time": self._tick()})
            self._ended = True
        self._sender.send(self._patience, insist=True)
        return {
            "tracking_id": self._id,
            "run_id": self._sender.run_id,
            "experiment": self._settings.experiment,
            "name": self._settings.name,
            "comparison": self._settings.tags.get("comparison", ""),
            "revision": self._settings.tags.get("git.revision", "unknown"),
        }

    def _sample(self, tokenizer: Any, episodes: Trajectories) -> list[Record]:
        """Some episodes as a table that MLflow can show, and the first of them as traces."""
        count = min(max(self._settings.episodes, self._settings.traces), len(episodes))
        chosen = episode_records(episodes.select(range(count)), tokenizer)
        found: list[Record] = []
        if self._settings.episodes:
            method = self._settings.tags.get("method", "")
            table = episode_table([(method, episode) for episode in chosen[: self._settings.episodes]])
            found = [{"kind": "text", "path": "episodes.json", "text": table}, {"kind": "tags", "values": TABLE_TAG}]
        traced = chosen[: self._settings.traces]
        return [*found, *({"kind": "trace", "episode": episode, "time": self._tick()} for episode in traced)]

    def _send(self) -> None:
        self._sender.send(self._patience)
        self._tried = time.monotonic()

    def _tick(self) -> int:
        """The time in ms; later than every time before, so that the store keeps the order."""
        self._time = max(now(), self._time + 1)
        return self._time


TABLE_TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": "episodes.json", "type": "table"}])}
"""By this tag MLflow's pages show episodes.json as a table."""


def episode_table(episodes: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Methods' episodes (see ``episode_records``) in the form of ``mlflow.load_table``: a row each, the dialogue as text."""
    columns = ["method", "episode", "state", "return", "success", "end", "dialogue"]
    rows = [
        [
            method,
            *(record[key] for key in ("id", "state", "return", "success", "end")),
            "\n".join(f"{turn['shown']}{''.join(turn['tokens']['text'])}" for turn in record["turns"]),
        ]
        for method, record in episodes
    ]
    return json.dumps({"columns": columns, "data": rows})


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def _beginning(settings: RunSettings) -> list[Record]:
    """The records with which a run begins. Its id is its own: the same training, made again, has another run."""
    identity = {"tracking.id": uuid.uuid4().hex}
    return [
        run_record(settings.experiment, settings.name, identity, settings.parent, now()),
        {"kind": "tags", "values": {**settings.tags, "kind": "training"}},
        {"kind": "params", "values": settings.params},
        {"kind": "inputs", "datasets": settings.datasets},
        *({"kind": "text", "path": path, "text": text} for path, text in settings.texts.items()),
    ]
