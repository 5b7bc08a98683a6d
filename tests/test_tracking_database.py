"""A new SQLite store: whole or not there, whatever is killed while it is made."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.tracking.database import SIDE_FILES
from pipeline.tracking.spool import Spool, now, run_record
from pipeline.tracking.store import open_store
from pipeline.tracking.training import Store
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Cache
from tests.tracked import apart

pytestmark = pytest.mark.xdist_group("tracking")
fork = multiprocessing.get_context("fork")
KILLS = int(os.environ.get("FAULTS", "1"))
"""Stores whose making is killed at random, three times each: ``FAULTS=20`` for more."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}", tmp_path / ".cache")


def tables(database: Path) -> int:
    """How many tables can be seen in a database that another process writes."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
            return int(opened.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0])
    except sqlite3.Error:
        return 0


def killed(
    function: Callable[..., Any], arguments: tuple[Any, ...], reached: Callable[[], bool], delay: float = 0.0
) -> None:
    """Kill a process that makes a database so many seconds after something is reached, or when it has ended."""
    process = fork.Process(target=function, args=arguments)
    process.start()
    while process.is_alive() and not reached():
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()


def works(store: Store, folder: Path) -> None:
    """The store takes a run, and nothing lies beside it but what was set aside."""
    assert apart(open_store, store, "lake")[1] == 0
    assert apart(_names, store.uri) == ["Default", "lake"]
    assert {file.name for file in folder.iterdir()} <= {"mlflow.db", "mlflow.db.lock", "mlflow.db.unfinished"}


def _names(uri: str) -> list[str]:
    return sorted(found.name for found in MlflowClient(uri).search_experiments())


def spooled(store: Store, name: str) -> Spool:
    """A training of an iteration whose records nobody has been sent."""
    spool = Spool(Cache(store.cache).training(name) / "tracking")
    spool.append(
        run_record("lake", name, {"tracking.id": name}, None, now()),
        {"kind": "metrics", "values": {"success": 0.5}, "step": 0, "time": now()},
        {"kind": "end", "status": "FINISHED", "time": now()},
    )
    return spool


def tracked(uri: str) -> list[tuple[str, float, str]]:
    client = MlflowClient(uri)
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return sorted((run.data.tags["tracking.id"], run.data.metrics["success"], run.info.status) for run in found)


def size_of(database: Path) -> int:
    return database.stat().st_size if database.exists() else 0


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_store_whose_migration_is_killed_at_any_moment_is_made_anew_with_all_runs(
    seed: int, migrated: Path, store: Store, tmp_path: Path
) -> None:
    """First as MLflow makes one, where it is to be, then as it is made now, twice; each killed at a random size."""
    draws, whole, folder = random.Random(seed), size_of(migrated), tmp_path / "store"
    folder.mkdir()
    earlier, _ = spooled(store, "sent"), spooled(store, "unsent")
    earlier.mark(earlier.read()[-1][0], "in another store")
    for function, arguments, name in (
        (_names, (store.uri,), "mlflow.db"),
        *[(open_store, (store, "lake"), "mlflow.db.partial")] * 2,
    ):
        least = draws.randrange(whole)
        killed(function, arguments, lambda: size_of(folder / name) >= least, draws.random() / 20)  # noqa: B023
    for end in SIDE_FILES:  # as an earlier database of that name may have left them
        if not (folder / "mlflow.db").exists():
            (folder / f"mlflow.db{end}").write_bytes(b"of another database")
    works(store, folder)
    assert apart(tracked, store.uri) == [("sent", 0.5, "FINISHED"), ("unsent", 0.5, "FINISHED")]


def test_two_commands_at_once_make_one_database(store: Store, tmp_path: Path) -> None:
    processes = [fork.Process(target=open_store, args=(store, name)) for name in ("lake", "bandit")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert apart(_names, store.uri) == ["Default", "bandit", "lake"]
    assert set(os.listdir(tmp_path / "store")) == {"mlflow.db", "mlflow.db.lock"}


def test_a_half_made_database_of_an_earlier_version_is_made_anew_and_said_in_a_line(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    killed(_names, (store.uri,), lambda: tables(folder / "mlflow.db") >= 10)
    capfd.readouterr()
    works(store, folder)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"warning: tracking: {folder / 'mlflow.db'} is unfinished and holds no runs: made anew, the old one is "
        "mlflow.db.unfinished"
    )


def test_an_unfinished_database_with_runs_is_left_as_it_is(migrated: Path, store: Store, tmp_path: Path) -> None:
    database = tmp_path / "store" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(migrated, database)
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('a', 0)")
        opened.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    with pytest.raises(UserError) as caught:
        apart(open_store, store, "lake")
    assert str(caught.value).startswith(f"tracking.uri: {store.uri}: cannot be used: Detected out-of-date database")
    assert "\n" not in str(caught.value)
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before
