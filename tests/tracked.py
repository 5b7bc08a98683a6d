"""What the tests of tracking share: a migrated database, a real MLflow server, and a toy training in a process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.settings.params import Config
from pipeline.tracking.store import run_settings
from pipeline.tracking.training import RunSettings, Store
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from tests.trainings import LAKE


class Server:
    """``mlflow server`` on a port of its own, over a copy of a migrated database."""

    def __init__(self, folder: Path, database: Path) -> None:
        self._folder = folder
        shutil.copy(database, folder / "server.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        quick = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=quick, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.1)
        raise TimeoutError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Training:
    """A training in a process of its own, as stages run it, which waits at chosen iterations.

    Args:
        job: what to train.
        log: receives what it writes to standard error.
        stops: after how many iterations it waits for ``go_on``; the last of them has not been logged yet.
    """

    def __init__(self, job: TrainingJob, log: Path, stops: tuple[int, ...] = ()) -> None:
        context = multiprocessing.get_context("fork")
        self._reached = {stop: context.Event() for stop in stops}
        self._released = {stop: context.Event() for stop in stops}
        self._process = context.Process(target=self._run, args=(job, log))
        self._process.start()

    def _run(self, job: TrainingJob, log: Path) -> None:
        sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - as long as the process
        train_one(job, self._report)

    def _report(self, done: int, total: int, text: str = "") -> None:
        if done in self._reached:
            self._reached[done].set()
            self._released[done].wait(300)

    def reach(self, stop: int) -> None:
        assert self._reached[stop].wait(120), "the training has not come that far"

    def go_on(self, stop: int) -> None:
        self._released[stop].set()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def join(self) -> None:
        self._process.join(300)
        assert self._process.exitcode == 0


def toy_job(config: Config, policy: Path, store: Store, seed: int = 0, method: str = "grpo") -> TrainingJob:
    """A training whose run goes to a store, whatever the configuration says of it."""
    task = training_task(config, LAKE, method, seed, policy, store.cache)
    return TrainingJob(task, None, toy_settings(config, policy, store, method)[seed])


def toy_settings(config: Config, policy: Path, store: Store, method: str = "grpo") -> dict[int, RunSettings]:
    placed = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": store.uri})})
    return run_settings(placed, store.cache.parent, LAKE, method, {"reference policy": policy})


def runs_of(uri: str, kind: str) -> list[Any]:
    """All runs of a kind, oldest first."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(LAKE)
    wanted = f"tags.kind = '{kind}'"
    return list(client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time ASC"]))


def steps(uri: str, run_id: str, metric: str) -> list[int]:
    """Iterations of a metric as the store has them, by the time at which they were logged."""
    return [point.step for point in MlflowClient(uri).get_metric_history(run_id, metric)]


@contextlib.contextmanager
def started(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, so that no connection to a store is carried across a later fork."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)
