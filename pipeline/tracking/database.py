"""An SQLite store appears all at once: its tables are made beside it, which takes seconds, and it is then renamed."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import mlflow
from alembic.script import ScriptDirectory
from mlflow.store.db.base_sql_model import Base
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from pipeline.tracking.spool import told
from pipeline.workspace.files import lock

SIDE_FILES = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a database; to a new one of the same name it would do harm."""


def ready(uri: str) -> None:
    """Make the database of a store if it is not there. Whatever is killed meanwhile, it is whole or not there.

    One whose tables are not those of this MLflow, as a migration leaves it that was killed, is moved aside if it holds no
    runs, and made anew; standard error says so in a line. One that holds runs is left for MLflow to judge. To be called in
    a process of its own if this one forks later.

    Args:
        uri: tracking URI; nothing is done unless it is a file of SQLite.

    Raises:
        OSError: its folder cannot be written to.
        MlflowException, sqlalchemy.exc.SQLAlchemyError: MLflow cannot make it.
    """
    url = _file_url(uri)
    if url is None or _finished(file := Path(str(url.database)).resolve()):
        return
    with lock(file.with_name(file.name + ".lock")):
        if _finished(file):  # another process has been faster
            return
        partial = file.with_name(file.name + ".partial")
        if file.exists() and file.stat().st_size:
            aside = file.with_name(file.name + ".unfinished")
            file.replace(aside)
            told(f"{file} is unfinished and holds no runs: made anew, the old one is {aside.name}")
        _remove(partial)
        address = url.set(database=str(partial)).render_as_string(hide_password=False)
        store = SqlAlchemyStore(address, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        _remove(file)
        partial.replace(file)


def has_no_runs(uri: str) -> bool:
    """Whether a store is a file of SQLite that has never been sent a run: it is new, or has been made anew."""
    url = _file_url(uri)
    if url is None:
        return False
    try:
        with closing(sqlite3.connect(f"file:{quote(str(url.database))}?mode=ro", uri=True)) as database:
            return database.execute("SELECT 1 FROM runs").fetchone() is None
    except sqlite3.Error:
        return False


def _file_url(uri: str) -> URL | None:
    """The address of a file of SQLite, None for everything else."""
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):  # its port is no number
        return None
    named = url.database not in (None, "", ":memory:") and not str(url.database).startswith("file:")
    return url if url.get_backend_name() == "sqlite" and named else None


def _finished(file: Path) -> bool:
    """Whether there is nothing to be made: it has the tables of this MLflow, or holds runs, or is none of MLflow's."""
    if not file.exists() or not file.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(file)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and not tables & {*Base.metadata.tables, "alembic_version"}:
                return True  # somebody's, of other things
            versions = (
                database.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else ()
            )
            if [version for (version,) in versions] == [_newest_version()]:
                return True
            return "runs" in tables and database.execute("SELECT 1 FROM runs").fetchone() is not None
    except sqlite3.Error:  # not a database, or in use
        return True


def _newest_version() -> str | None:
    """The version of the tables that this MLflow makes."""
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations"
    return ScriptDirectory(str(migrations)).get_current_head()


def _remove(file: Path) -> None:
    """A database that nobody has open, and what SQLite has left beside it."""
    for name in ("", *SIDE_FILES):
        file.with_name(file.name + name).unlink(missing_ok=True)
