"""Runs that go to a real MLflow server, which is killed and comes back: nothing is lost, nothing is there twice."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.settings.params import Config
from pipeline.tracking import training as tracking_training
from pipeline.tracking.send import send_waiting
from pipeline.tracking.store import open_store
from pipeline.tracking.training import Store, TrainingRun
from pipeline.workspace.errors import UserError
from tests.tracked import Server, Training, apart, mlflow_server, runs_of, started, steps, toy_job, toy_settings
from tests.trainings import LAKE, configured

ITERATIONS = 10
pytestmark = pytest.mark.xdist_group("tracking")


@pytest.fixture(autouse=True)
def _every_iteration_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy training is over within the seconds for which metrics are collected."""
    monkeypatch.setattr(tracking_training, "EVERY", 0.0)


@pytest.fixture(scope="module")
def config() -> Config:
    return configured({"train": {"iterations": ITERATIONS}, "tracking": {"traces": 2, "episodes": 3}})


@pytest.fixture(scope="module")
def server(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that is killed and started by the tests; they share its database."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "server.db")
    with started(mlflow_server(folder, f"sqlite:///{folder / 'server.db'}", str(folder / "artifacts"))) as running:
        yield running


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Store:
    return Store(server.uri, tmp_path / ".cache")


def whole(uri: str, run_id: str, every: bool = False) -> None:
    """Metrics of every iteration are there once, in order (``every`` metric, or some), and all else that a run has."""
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    always = ("success", "entropy", "tokens_total", "system/process_memory_usage_megabytes")
    assert set(always) <= set(run.data.metrics)
    for metric in run.data.metrics if every else always:
        found = steps(uri, run_id, metric)
        assert found == sorted(set(found)), metric
        if metric in always:
            assert found == list(range(ITERATIONS)), metric
    assert run.data.params["train.iterations"] == str(ITERATIONS)
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["policy"]
    assert {file.path for file in client.list_artifacts(run_id)} == {"params.yaml", "episodes.json"}
    traces = [
        t
        for t in client.search_traces(locations=[run.info.experiment_id])
        if t.info.request_metadata["mlflow.sourceRun"] == run_id
    ]
    assert len(traces) == 2
    for trace in traces:
        first, *turns = sorted(trace.data.spans, key=lambda span: span.start_time_ns + (span.parent_id is not None))
        assert first.parent_id is None
        assert [span.name for span in turns] == [f"turn {number + 1}" for number in range(len(turns))]
        assert all(len(span.attributes["energy"]) == len(span.attributes["text"]) > 0 for span in turns)
    assert run.info.status == "FINISHED"


def test_a_server_that_is_killed_during_a_training_and_comes_back_has_everything_once(
    config: Config, directory: Path, server: Server, store: Store, tmp_path: Path
) -> None:
    training = Training(toy_job(config, directory, store), tmp_path / "log", stops=(4, 7))
    training.reach(4)
    [run] = runs_of(store.uri, "training")
    server.kill()
    training.go_on(4)
    training.reach(7)  # three iterations without a server
    server.start()
    assert steps(store.uri, run.info.run_id, "success") == [0, 1, 2]
    training.go_on(7)
    training.join()

    assert send_waiting(store.uri, store.cache) == (0, 0)
    assert [found.info.run_id for found in runs_of(store.uri, "training")] == [run.info.run_id]
    whole(store.uri, run.info.run_id, every=True)
    assert (tmp_path / "log").read_text().count("cannot be used now") == 1
    MlflowClient(store.uri).delete_run(run.info.run_id)


def test_a_server_that_is_away_from_the_start_is_sent_everything_later(
    config: Config, directory: Path, server: Server, store: Store, tmp_path: Path
) -> None:
    server.kill()
    jobs = [toy_job(config, directory, store, seed) for seed in (0, 1)]
    for training in [Training(job, tmp_path / "log") for job in jobs]:
        training.join()
    noted = [json.loads((job.task.result / "runs.json").read_text()) for job in jobs]
    assert [entry["run_id"] for entry in noted] == [None, None]
    assert (tmp_path / "log").read_text().count("cannot be used now") == 1  # two processes of one command

    server.start()
    assert apart(open_store, store, LAKE) == (2, 0)
    found = runs_of(store.uri, "training")
    assert {run.data.tags["tracking.id"] for run in found} == {entry["tracking_id"] for entry in noted}
    [parent] = runs_of(store.uri, "comparison")
    for run in found:
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        whole(store.uri, run.info.run_id)

    # All of it once more: to the store these are the same records.
    for job in jobs:
        sent = job.task.cache / "tracking" / "sent.json"
        sent.write_text(json.dumps({**json.loads(sent.read_text()), "offset": 0}))
    assert send_waiting(store.uri, store.cache) == (2, 0)
    for job in jobs:
        (job.task.cache / "tracking" / "sent.json").unlink()  # the answer to the first call was lost
    assert send_waiting(store.uri, store.cache) == (2, 0)
    assert len(runs_of(store.uri, "training")) == 2
    for run in found:
        whole(store.uri, run.info.run_id)
        MlflowClient(store.uri).delete_run(run.info.run_id)


def test_a_killed_training_goes_on_in_its_run(
    config: Config, directory: Path, server: Server, store: Store, tmp_path: Path
) -> None:
    job = toy_job(config, directory, store)
    training = Training(job, tmp_path / "log", stops=(5,))
    training.reach(5)
    training.kill()
    records = job.task.cache / "tracking" / "records.jsonl"
    with records.open("ab") as file:
        file.write(b'{"kind": "metr')  # as a kill within a write would leave it
    Training(job, tmp_path / "log").join()

    [run] = runs_of(store.uri, "training")
    whole(store.uri, run.info.run_id)
    assert (job.task.cache / "begun.log").read_text().split() == [str(i) for i in [*range(5), *range(4, ITERATIONS)]]
    MlflowClient(store.uri).delete_run(run.info.run_id)


def test_a_store_without_the_run_is_sent_all_of_it(
    config: Config, directory: Path, server: Server, store: Store, tmp_path: Path
) -> None:
    """The run was deleted, or the store is another one by now."""
    settings = toy_settings(config, directory, store)[0]
    run = TrainingRun(settings, tmp_path / "training")
    run.log({"success": 0.1}, 0)
    [first] = runs_of(store.uri, "training")
    MlflowClient(store.uri).delete_run(first.info.run_id)
    again = TrainingRun(settings, tmp_path / "training")
    again.log({"success": 0.2}, 1)
    [second] = runs_of(store.uri, "training")
    assert steps(store.uri, second.info.run_id, "success") == [0, 1]
    assert again.finish(None, None)["run_id"] == second.info.run_id
    MlflowClient(store.uri).delete_run(second.info.run_id)


def test_a_server_that_accepts_and_never_answers_hardly_delays_a_training(
    config: Config, directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / ".cache")
        settings = toy_settings(config, directory, store)[0]
        began = time.monotonic()
        run = TrainingRun(settings, tmp_path / "training")
        assert time.monotonic() - began < 6
        began = time.monotonic()
        for iteration in range(5):
            run.log({"success": 0.5}, iteration)
        assert time.monotonic() - began < 1
    assert capfd.readouterr().err.count("cannot be used now") == 1


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


def test_a_server_that_refuses_is_a_mistake_and_not_away(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refuses) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{refusing.server_port}"
        with pytest.raises(UserError, match=r"tracking\.uri: http://127.0.0.1:.* cannot be used"):
            open_store(Store(uri, tmp_path / ".cache"), LAKE)
        refusing.shutdown()
