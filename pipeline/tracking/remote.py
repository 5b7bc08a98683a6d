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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipeline.tracking.database import has_no_runs, ready
from pipeline.tracking.records import Record
from pipeline.tracking.spool import forget
from pipeline.tracking.traces import log_trace
from pipeline.workspace.files import lock
from pipeline.workspace.layout import Cache

METRICS_AT_ONCE = 1000
"""MLflow's limit of metrics in a call; params and tags may be 100."""


@dataclass(frozen=True)
class RemoteRun:
    """One run in a store."""

    client: MlflowClient
    uri: str
    id: str
    experiment: str
    """Id of the run's experiment."""

    def write(self, record: Record) -> None:
        """Send one record of any kind but ``metrics``."""
        match record["kind"]:
            case "tags":
                self._log("tags", [RunTag(key, value) for key, value in record["values"].items()], 100)
            case "params":
                self._log("params", [Param(key, str(value)) for key, value in record["values"].items()], 100)
            case "inputs":
                self.client.log_inputs(self.id, [_dataset(one) for one in record["datasets"]])
            case "text" | "file":
                with _artifacts():
                    self._keep(record)
            case "trace":
                log_trace(self.uri, self.experiment, self.id, record)
            case "champion":
                from pipeline.tracking.champion import register  # imports torch and transformers

                with _artifacts():
                    register(self.client, self.uri, self.id, record)
            case "end":
                self.client.set_terminated(self.id, record["status"], record["time"])
            case kind:
                assert kind == "run", kind

    def metrics(self, records: list[Record]) -> None:
        """Send several records of metrics in as few calls as may be."""
        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        self._log("metrics", metrics, METRICS_AT_ONCE)

    def _keep(self, record: Record) -> None:
        if record["kind"] == "text":
            self.client.log_text(self.id, record["text"], record["path"])
        elif Path(record["source"]).exists():  # else a later run of the stage has replaced it
            try:
                with open(record["source"], "rb"):
                    pass
            except OSError as error:  # it is not the store that is away
                raise MlflowException(f"{record['source']}: {error.strerror}", INVALID_PARAMETER_VALUE) from None
            self.client.log_artifact(self.id, record["source"], record["path"] or None)

    def _log(self, kind: str, values: list[Any], at_once: int) -> None:
        for start in range(0, len(values), at_once):
            batch: dict[str, Any] = {kind: values[start : start + at_once]}
            self.client.log_batch(self.id, **batch)


def remote_run(uri: str, cache: Path, known: str | None, first: Record) -> RemoteRun:
    """The run of a spool: the one that is known, if it still is there, else one with its identity, else a new one.

    Args:
        uri: tracking URI.
        cache: folder in whose lock runs are made, so that two processes do not make one each.
        known: id of the run that earlier records were sent to.
        first: the spool's record of kind ``run``.
    """
    client = client_of(uri, cache)
    experiment = experiment_id(client, first["experiment"])
    if known is None or not _active(client, known):
        with lock(Cache(cache).tracking / "lock"):
            above = first["parent"]
            parent = None if above is None else _find_or_create(client, experiment, above)
            known = _find_or_create(client, experiment, first, parent)
    return RemoteRun(client, uri, known, experiment)


def client_of(uri: str, cache: Path) -> MlflowClient:
    """A store's client. One that is new is made, and will be sent all that the cache folder has: nothing is in it yet."""
    ready(uri)
    if has_no_runs(uri):
        forget(cache)
    return MlflowClient(uri)


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


def _find_or_create(client: MlflowClient, experiment: str, run: Record, parent: str | None = None) -> str:
    """Id of the run that has all tags of ``identity``; the oldest, if two machines have made one each."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in run["identity"].items())
    found = client.search_runs([experiment], wanted, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time ASC"])
    if found:
        return str(found[0].info.run_id)
    nested = {} if parent is None else {MLFLOW_PARENT_RUN_ID: parent}
    tags = {**run["identity"], **nested, MLFLOW_RUN_NAME: run["name"]}
    return str(client.create_run(experiment, run.get("time"), tags).info.run_id)


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


@contextmanager
def _artifacts() -> Iterator[None]:
    """Have whatever fails while an artifact is sent be an error that the sender knows.

    A run whose artifacts do not go through the server (``--no-serve-artifacts``) has them sent by the store's own library,
    here, and the errors of these libraries have no common base.

    Raises:
        MlflowException, OSError: it was not sent.
    """
    try:
        yield
    except (MlflowException, OSError):
        raise
    except Exception as error:
        raise OSError(f"artifacts: {error}") from error


def _dataset(one: Mapping[str, str]) -> DatasetInput:
    dataset = Dataset(one["name"], one["digest"], "local", json.dumps({"uri": one["source"]}))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, one["context"])])
