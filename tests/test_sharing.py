"""An MLflow server with PostgreSQL and S3, as compose.yaml starts it, with and without its S3 store; the file itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

from pipeline.settings.params import Config
from pipeline.tracking.patience import HURRIED
from pipeline.tracking.send import Sender, send_waiting
from pipeline.tracking.spool import Spool, run_record
from pipeline.tracking.store import open_store
from pipeline.tracking.training import Store
from pipeline.workspace.yaml_files import read_yaml
from tests.searches import new_database, postgresql
from tests.shared_stores import BUCKET, KEYS, bucket, objects, s3_server
from tests.tracked import Server, Training, apart, runs_of, started, steps, toy_job
from tests.trainings import LAKE, configured

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "compose.yaml"
ITERATIONS = 3
pytestmark = pytest.mark.xdist_group("tracking")


@pytest.fixture(scope="module")
def config() -> Config:
    return configured({"train": {"iterations": ITERATIONS}, "tracking": {"traces": 1, "episodes": 2}})


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(COMPOSE)["services"]
    return found


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgresql() as url:
        yield new_database(url)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def server(
    services: dict[str, Any], database: str, s3: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The command of compose.yaml, at addresses of its own."""
    command = services["mlflow"]["command"]
    places = {"0.0.0.0": "127.0.0.1", "5000": "{port}", "postgresql+psycopg://actfocus@postgresql/mlflow": database}
    assert set(places) <= set(command)
    variables = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3.uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    module = [*(places.get(word, word) for word in command), "--workers", "1"]
    log = tmp_path_factory.mktemp("server") / "log"
    with started(Server(log, "/health", module, variables)) as running:
        yield running


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Store:
    return Store(server.uri, tmp_path / ".cache")


def kept(database: str, run_id: str) -> list[int]:
    """Iterations of the metric ``success`` that the database has of a run."""
    with psycopg.connect(database.replace("+psycopg", "")) as connection:
        asked = "SELECT step FROM metrics WHERE run_uuid = %s AND key = 'success' ORDER BY step"
        return [step for (step,) in connection.execute(asked, (run_id,)).fetchall()]


def whole(store: Store, database: str, s3: Server) -> str:
    """The one training's run has all of its records: numbers in the database, artifacts in the bucket. Returns its id."""
    client = MlflowClient(store.uri)
    [run] = runs_of(store.uri, "training")
    assert run.info.status == "FINISHED"
    assert steps(store.uri, run.info.run_id, "success") == kept(database, run.info.run_id) == list(range(ITERATIONS))
    assert len(client.search_traces(locations=[run.info.experiment_id])) == 1
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"params.yaml", "episodes.json"}
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    sizes = objects(s3, f"mlflow/{run.info.experiment_id}/{run.info.run_id}/artifacts/")
    assert set(sizes) == names
    assert min(sizes.values()) > 100
    return str(run.info.run_id)


def test_a_training_goes_to_a_server_with_postgresql_and_s3_and_waits_for_neither(
    config: Config, directory: Path, store: Store, database: str, s3: Server, tmp_path: Path
) -> None:
    """First with its S3 store away: the training ends, says so once, and what was kept is sent when the store is back."""
    s3.kill()
    job = toy_job(config, directory, store)
    Training(job, tmp_path / "log").join()
    said = (tmp_path / "log").read_text()
    assert said.count("cannot be used now") == said.count("runs are kept in .cache") == 1
    assert "Traceback" not in said
    [run] = runs_of(store.uri, "training")
    assert run.data.params["train.iterations"] == str(ITERATIONS)
    assert run.data.metrics == {}, "records are sent in order"

    s3.start()
    bucket(s3)
    assert apart(open_store, store, LAKE) == (1, 0)
    assert whole(store, database, s3) == run.info.run_id
    sent = job.task.cache / "tracking" / "sent.json"
    sent.unlink()  # all of it once more: to database and bucket these are the same records
    assert send_waiting(store.uri, store.cache) == (1, 0)
    assert whole(store, database, s3) == run.info.run_id
    MlflowClient(store.uri).delete_run(run.info.run_id)


def test_a_store_of_artifacts_that_a_training_reaches_itself_may_be_away_too(
    migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a server between them the errors are the store's own library's, here boto3's."""
    for name, value in {**KEYS, "AWS_MAX_ATTEMPTS": "1", "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="Could not connect") as caught:
        S3ArtifactRepository(f"s3://{BUCKET}/direct").log_artifact(str(COMPOSE))
    assert not isinstance(caught.value, OSError | MlflowException)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    spool = Spool(tmp_path / "run")
    spool.append(run_record("direct", "one", {"tracking.id": "direct"}, None, 1))
    spool.append({"kind": "text", "path": "params.yaml", "text": "seeds: [0]"})
    assert apart(sent_directly, spool, f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / ".cache") is False
    assert spool.waiting
    assert "cannot be used now: artifacts: " in capfd.readouterr().err


def sent_directly(spool: Spool, uri: str, cache: Path) -> bool:
    """Whether a run's records are sent whose artifacts go to S3 from here."""
    MlflowClient(uri).create_experiment("direct", f"s3://{BUCKET}/direct")
    return Sender(spool, uri, cache).send(HURRIED)


# --------------------------------------------------------------------------------------------------------- compose.yaml


def test_the_compose_file_keeps_to_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_compose_file_names_is_there(services: dict[str, Any]) -> None:
    declared = read_yaml(COMPOSE)
    mounts = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert mounts == set(declared["volumes"])
    configs = {config["source"] for service in services.values() for config in service.get("configs", [])}
    assert configs == set(declared["configs"])
    for name, service in services.items():
        assert "build" in service or re.search(r":\d[\d.]*$", service["image"]), f"{name}: an image without a version"
        awaited = service.get("depends_on", {})
        assert all("healthcheck" in services[o] for o, how in awaited.items() if how["condition"] == "service_healthy")
        once = any(name in other.get("depends_on", {}) and how_it_ends(other, name) for other in services.values())
        assert once != ("healthcheck" in service), f"{name}: nobody can tell whether it works"
    built = services["mlflow"]["build"]["dockerfile_inline"]
    assert "-c constraints.txt mlflow psycopg[binary] boto3" in built
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"mlflow", "psycopg", "psycopg-binary", "boto3"} <= pinned


def how_it_ends(other: dict[str, Any], name: str) -> bool:
    """Whether a service waits for the end of another."""
    return bool(other["depends_on"][name]["condition"] == "service_completed_successfully")


def test_the_compose_file_opens_ports_to_its_machine_alone_and_has_no_password_of_its_own(
    services: dict[str, Any],
) -> None:
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(ports) == {"postgresql", "store", "mlflow"}
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for opened in ports.values() for port in opened)
    secrets = [
        (key, value)
        for service in services.values()
        for key, value in service.get("environment", {}).items()
        if re.search("PASSWORD|SECRET|KEY", key)
    ]
    assert len(secrets) >= 7
    assert all(re.fullmatch(r"\$\{\w+:\?.+\}", value) for _, value in secrets), secrets


def test_documents_name_the_addresses_of_the_compose_file(services: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name in ("store", "mlflow"):
        [port] = services[name]["ports"]
        assert f"http://{port.rpartition(':')[0]}" in text
    words = services["mlflow"]["command"]
    asked = dict(zip(words[2::2], words[3::2], strict=True))
    assert asked["--artifacts-destination"] in text
    assert asked["--backend-store-uri"].replace("@postgresql/", "@127.0.0.1/") in text
