"""A run in an MLflow store: how it is found or made, and what becomes of each kind of record.

Sending a record again changes nothing: a run is looked up by its identity (tags) before it is made; MLflow's SQL store
keeps one metric per (key, step, time, value), one dataset input per (name, digest, run) and one span per (trace, id),
and replaces tags and artifacts. Kinds of records, in the order in which a run has them:

* ``run``: experiment, name, identity, time (of its start) and parent (name and identity) or None
* ``tags``, ``params``: values
* ``inputs``: datasets, each with name, digest, source and context
* ``metrics``: values, step, time
* ``text``: path and text; ``file``: path (a folder in the run) and source (a file, sent as it is then)
* ``trace``: episode (a record of ``pipeline.trajectories.records``) and time
* ``champion``: see ``champion.py``
* ``end``: status and time

Times are milliseconds since 1970.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipeline.tracking.database import ready
from pipeline.tracking.spool import Record
from pipeline.tracking.traces import log_trace
from pipeline.workspace.files import lock
from pipeline.workspace.layout import Cache

METRICS_AT_ONCE = 1000
"""MLflow's limit of metrics in a call; params and tags may be 100."""


class RemoteRun:
    """One run in a store."""

    def __init__(self, client: MlflowClient, uri: str, run_id: str, experiment: str) -> None:
        self._client, self._uri, self.id, self._experiment = client, uri, run_id, experiment
        self._writers: dict[str, Callable[[Record], None]] = {
            "run": lambda record: None,
            "tags": self._tags,
            "params": self._params,
            "inputs": self._inputs,
            "metrics": lambda record: self.metrics([record]),
            "text": lambda record: client.log_text(run_id, record["text"], record["path"]),
            "file": self._file,
            "trace": lambda record: log_trace(uri, experiment, run_id, record),
            "champion": self._champion,
            "end": lambda record: client.set_terminated(run_id, record["status"], record["time"]),
        }

    def write(self, record: Record) -> None:
        """Send one record."""
        self._writers[record["kind"]](record)

    def metrics(self, records: list[Record]) -> None:
        """Send several records of metrics in as few calls as may be."""
        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        for part in _parts(metrics, METRICS_AT_ONCE):
            self._client.log_batch(self.id, metrics=part)

    def _tags(self, record: Record) -> None:
        for part in _parts([RunTag(key, value) for key, value in record["values"].items()], 100):
            self._client.log_batch(self.id, tags=part)

    def _params(self, record: Record) -> None:
        for part in _parts([Param(key, str(value)) for key, value in record["values"].items()], 100):
            self._client.log_batch(self.id, params=part)

    def _inputs(self, record: Record) -> None:
        datasets = [
            DatasetInput(
                Dataset(one["name"], one["digest"], "local", json.dumps({"uri": one["source"]})),
                [InputTag(MLFLOW_DATASET_CONTEXT, one["context"])],
            )
            for one in record["datasets"]
        ]
        self._client.log_inputs(self.id, datasets)

    def _file(self, record: Record) -> None:
        if Path(record["source"]).exists():  # else a later run of the stage has replaced it
            self._client.log_artifact(self.id, record["source"], record["path"] or None)

    def _champion(self, record: Record) -> None:
        from pipeline.tracking.champion import register  # imports torch and transformers

        register(self._client, self._uri, self.id, record)


def remote_run(uri: str, cache: Path, known: str | None, first: Record) -> RemoteRun:
    """The run of a spool: the one that is known, if it still is there, else one with its identity, else a new one.

    Args:
        uri: tracking URI.
        cache: folder in whose lock runs are made, so that two processes do not make one each.
        known: id of the run that earlier records were sent to.
        first: the spool's record of kind ``run``.
    """
    ready(uri)
    client = MlflowClient(uri)
    experiment = experiment_id(client, first["experiment"])
    if known is None or not _active(client, known):
        with lock(Cache(cache).tracking / "lock"):
            tags = {}
            if first["parent"] is not None:
                tags[MLFLOW_PARENT_RUN_ID] = _find_or_create(client, experiment, **first["parent"])
            known = _find_or_create(client, experiment, first["name"], first["identity"], tags, first["time"])
    return RemoteRun(client, uri, known, experiment)


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of an experiment, which is made if it is not there.

    Raises:
        MlflowException: it is deleted, or the store does not say.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise MlflowException(f"experiment {name} is deleted; restore it", INVALID_PARAMETER_VALUE)
    return str(found.experiment_id)


def find_run(client: MlflowClient, experiment: str, identity: Mapping[str, str]) -> str | None:
    """Id of the run that has all tags of ``identity``; the oldest, if two machines have made one each."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment], wanted, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time ASC"])
    return str(found[0].info.run_id) if found else None


def _find_or_create(
    client: MlflowClient,
    experiment: str,
    name: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
    start: int | None = None,
) -> str:
    found = find_run(client, experiment, identity)
    if found is None:
        created = client.create_run(experiment, start, {**identity, **(tags or {}), MLFLOW_RUN_NAME: name})
        found = str(created.info.run_id)
    return found


def _active(client: MlflowClient, run_id: str) -> bool:
    """Whether the store has the run, and not among the deleted ones.

    Raises:
        MlflowException: the store does not say.
    """
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return False
        raise


def _parts(values: list[Any], size: int) -> list[list[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
