"""What the tests of tracking share: a migrated database, a real MLflow server, and a toy training in a process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A server on a port of its own, in a process that tests kill and start again.

    Args:
        log: receives what it writes.
        health: path of a page that is there once it works.
        module: of Python, with its arguments; ``{port}`` in them is the port.
        variables: of its environment, beside this process's.
    """

    def __init__(self, log: Path, health: str, module: Sequence[str], variables: Mapping[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._log, self._health, self._variables = log, health, dict(variables)
        self._command = [sys.executable, "-m", *(word.replace("{port}", str(port)) for word in module)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, **self._variables}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}{self._health}", timeout=5):
                return
            time.sleep(0.1)
        raise TimeoutError(self._log.read_text())

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def mlflow_server(folder: Path, backend: str, artifacts: str, variables: Mapping[str, str] | None = None) -> Server:
    """``mlflow server`` over a database, which sends artifacts on."""
    module = ["mlflow", "server", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1"]
    module += ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Server(folder / "server.log", "/health", module, {**quick, **(variables or {})})


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
