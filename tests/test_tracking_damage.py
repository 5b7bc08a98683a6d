"""What is damaged on the way to MLflow stops no training, and lacks nothing in the store that can still be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.commands.sync import main as sync
from pipeline.tracking.patience import Away
from pipeline.tracking.send import send_waiting
from pipeline.tracking.spool import Spool, run_record
from pipeline.tracking.store import open_store
from pipeline.tracking.training import RunSettings, Store, TrainingRun
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Cache
from pipeline.workspace.processes import in_own_process

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("tracking")


@pytest.fixture
def store(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)  # artifacts go beside it
    return Store(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / ".cache")


def training(store: Store, name: str) -> TrainingRun:
    parent = {"name": "smoke", "identity": {"kind": "comparison", "comparison": "smoke"}}
    settings = RunSettings(store, "lake", name, parent, {"method": name}, {"a": 1}, [], {"params.yaml": "a: 1\n"}, 0, 0)
    return TrainingRun(settings, Cache(store.cache).training(name))


def successes(uri: str, method: str) -> list[tuple[list[tuple[int, float]], str]]:
    """Steps and values of each run of a method, and how it has ended."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lake")
    found = client.search_runs([experiment.experiment_id], f"tags.method = '{method}'")
    history = [client.get_metric_history(run.info.run_id, "success") for run in found]
    points = [sorted((point.step, point.value) for point in one) for one in history]
    return [(one, run.info.status) for one, run in zip(points, found, strict=True)]


def records(store: Store, name: str) -> Path:
    return Cache(store.cache).training(name) / "tracking" / "records.jsonl"


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "flipped": lambda file: file.write_bytes(file.read_bytes().replace(b"0.25", b"0.75", 1)),
    "wrong_types": lambda file: file.write_text('{"kind": "run", "identity": [], "time": "now"}\n[1]\n'),
    "not_utf_8": lambda file: file.write_bytes(b"\xff\xfe\n" * 9),
    "folder": as_folder,
    "note_of_what_was_sent": lambda file: file.with_name("sent.json").write_text('{"offset": []'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_spool_of_another_training_stops_none(
    name: str, store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = Store("http://127.0.0.1:9", store.cache)
    other = training(nowhere, "other")
    for iteration in range(3):
        other.log({"success": 0.25 * iteration}, iteration)
    other.finish(None, None)
    Away(store.cache, "").over()
    DAMAGES[name](records(store, "other"))
    capfd.readouterr()
    open_store(store, "lake")
    own = training(store, "own")
    own.log({"success": 1.0}, 0)
    assert own.finish(None, None)["run_id"] is not None
    assert successes(store.uri, "own") == [([(0, 1.0)], "FINISHED")]
    said = capfd.readouterr().err.splitlines()
    assert [str(records(store, "other")) in line for line in said] == [True] * (name != "note_of_what_was_sent")
    assert send_waiting(store.uri, store.cache) == (0, 0)
    known = {(0, 0.0), (1, 0.25), (2, 0.5)}
    for points, _ in successes(store.uri, "other"):
        assert set(points) <= known, "what was damaged is not sent as if it were not"


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "note_of_what_was_sent"])
def test_a_resumed_training_whose_own_spool_is_damaged_has_all_iterations(name: str, store: Store) -> None:
    killed = training(store, "own")
    rows = [{"success": 0.25 * iteration} for iteration in range(3)]
    for iteration, row in enumerate(rows):
        killed.log(row, iteration)
    DAMAGES[name](records(store, "own"))
    resumed = training(store, "own")
    for iteration, row in enumerate(rows):  # as those of its checkpoint
        resumed.log(row, iteration, earlier=True)
    resumed.log({"success": 0.75}, 3)
    run_id = resumed.finish(None, None)["run_id"]
    assert run_id is not None
    whole = ([(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)], "FINISHED")
    assert whole in successes(store.uri, "own")
    run = MlflowClient(store.uri).get_run(run_id)
    assert run.data.params == {"a": "1"}
    assert [file.path for file in MlflowClient(store.uri).list_artifacts(run_id)] == ["params.yaml"]


def test_a_file_that_cannot_be_sent_holds_up_its_own_run_alone(
    store: Store, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "figure.png"
    folder.mkdir()
    spool = Spool(Cache(store.cache).tracking / "a")
    spool.append(
        run_record("lake", "a", {"kind": "study"}, None, 1000),
        {"kind": "file", "path": "", "source": str(folder), "digest": ""},
    )
    nowhere = training(Store("http://127.0.0.1:9", store.cache), "b")
    nowhere.log({"success": 1.0}, 0)
    Away(store.cache, "").over()
    capfd.readouterr()
    assert send_waiting(store.uri, store.cache) == (1, 1)
    assert str(folder) in capfd.readouterr().err
    assert successes(store.uri, "b")[0][0] == [(0, 1.0)]


def test_a_note_of_a_store_that_is_away_may_be_anything(store: Store) -> None:
    away = Away(store.cache, store.uri)
    place = Cache(store.cache).tracking / "away"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\xff\xfe")
    away.note("gone")
    assert away.recently
    away.over()
    assert not away.recently
    place.mkdir()
    away.note("gone")
    away.over()
    assert not away.recently


@pytest.mark.parametrize(
    "uri",
    ["http://me:Xq7Zw@127.0.0.1:9", "http://me:Xq7Zw/kV4pN@127.0.0.1:9", "http://Xq7Zw@127.0.0.1:9/",
     "http://127.0.0.1:9/?token=Xq7Zw&x=kV4pN", "http://127.0.0.1:9/#access_token=Xq7Zw",
     "postgresql+psycopg://me:Xq7Zw/kV4pN@127.0.0.1:1/a", "mysql://me:Xq7Zw@127.0.0.1/a",
     "me:Xq7Zw@127.0.0.1:9", "http:me:Xq7Zw@127.0.0.1", "unknown://me:Xq7Zw@127.0.0.1"],
)  # fmt: skip
def test_no_command_tells_what_lets_people_in(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said = in_own_process(_said)
    said += "".join(capfd.readouterr())
    assert "127.0.0.1" in said
    assert "Xq7Zw" not in said
    assert "kV4pN" not in said
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in kept if b"Xq7Zw" in file.read_bytes()]


def _said() -> str:
    try:
        return sync()
    except UserError as error:
        return str(error)
