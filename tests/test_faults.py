"""A full disk, a folder that is read-only, limits of files, their sizes and processes: commands say so in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipeline.workspace.faults import fault_line, writing
from pipeline.workspace.files import replacing, write_text
from tests.commands import complaints

ROOT = Path(__file__).parents[1]
NOBODY = 65534
COMMANDS = """
import contextlib, io, json, os, resource, sqlite3, sys, tempfile
from pathlib import Path
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
from safetensors.numpy import save_file
from pipeline.commands.cli import run
from pipeline.workspace.files import lock, replacing, write_json, write_text
from pipeline.workspace.processes import in_own_process
from pipeline.tracking.spool import Spool

numbers = np.arange(10**5, dtype=np.float64)[::-1] ** 0.5
made = Path("made/out")

def database():
    opened = sqlite3.connect("out.db")
    opened.execute("create table t (x)")
    opened.execute("insert into t values (?)", (numbers.tobytes(),))
    opened.commit()

def replaced(write):
    with replacing(made) as partial:
        write(partial)

KINDS = {
    "text": lambda: write_text(made, "x" * 10**6),
    "json": lambda: write_json(made, list(range(10**5))),
    "parquet": lambda: replaced(lambda partial: pq.write_table(pa.table({"numbers": numbers}), partial)),
    "safetensors": lambda: replaced(lambda partial: save_file({"numbers": numbers}, partial)),
    "sqlite": database,
    "records": lambda: Spool(Path("made/spool")).append({"kind": "text", "text": "x" * 10**6}),
    "lock": lambda: lock(Path("made/lock")).__enter__(),
    "files": lambda: [open("/dev/null") for _ in range(99)],
    "worker": lambda: in_own_process(write_text, made, "x" * 10**6),
    "process": lambda: in_own_process(os.getpid),
    "nothing": lambda: None,
}

def begin(folder, user=0, output=None, **limits):
    os.chdir(folder)
    if output == "pipe":
        reading, ended = os.pipe()
        os.close(reading)
        os.dup2(ended, 1)
    elif output is not None:
        os.dup2(os.open(output, os.O_WRONLY), 1)
    if user:
        os.setgid(user), os.setuid(user)
    if "NOFILE" in limits:
        limits["NOFILE"] += len(os.listdir("/proc/self/fd"))
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

def warm() -> str:
    return str(KINDS["process"]())

sys.argv = ["command"]
with contextlib.redirect_stdout(io.StringIO()):
    run(warm)  # what is imported late may not be readable to others
results = []
for kind, settings in json.load(sys.stdin):
    def main() -> str:
        KINDS[kind]()
        return "x" * 10**5
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        begin(**settings)
        run(main)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(os.pread(file.fileno(), 10**6, 0).decode() for file in (out, err))])
print(json.dumps(results))
"""
Case = tuple[str, dict[str, Any], int, str]
"""What is done, under which limits, the fault, and part of the path that is told."""


def require_told(*cases: Case) -> None:
    """Every case ends in one line, with the path, what is the matter and the free space."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps([case[:2] for case in cases]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (kind, settings, number, path), (code, out, err) in zip(cases, json.loads(done.stdout), strict=True):
        if number:
            assert (code, out) == (1, ""), (kind, settings, err)
            lines = complaints(err)
            assert len(lines) == 1, (kind, settings, err)
            for part in (os.strerror(number), path, " MB free"):
                assert part in lines[0], (kind, settings)
            assert len(lines[0]) < 300
        else:
            assert code in (0, 1), (kind, settings, err)
            assert len(complaints(err)) == code, (kind, settings, err)


def folders(tmp_path: Path) -> Iterator[str]:
    """New folders that everybody may enter."""
    for place in (tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o755)
    for number in count():
        (tmp_path / str(number)).mkdir()
        yield str(tmp_path / str(number))


WRITERS = ("text", "json", "parquet", "safetensors", "records", "worker")


def test_limits_and_outputs_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    new = folders(tmp_path)
    require_told(
        *((kind, {"folder": next(new), "FSIZE": 4096}, errno.EFBIG, "made/") for kind in WRITERS),
        ("files", {"folder": next(new), "NOFILE": 4}, errno.EMFILE, "/dev/null"),
        *(("worker", {"folder": next(new), "NOFILE": more}, errno.EMFILE, "") for more in (0, 2, 4)),
        *(("process", {"folder": next(new), "NOFILE": more}, 0, "") for more in range(5, 12)),
        ("nothing", {"folder": next(new), "output": "/dev/full"}, errno.ENOSPC, "standard output: "),
        ("nothing", {"folder": next(new), "output": "pipe"}, errno.EPIPE, "standard output: "),
    )


@pytest.mark.skipif(os.getuid() != 0, reason="only root may run a command as somebody else")
def test_what_a_user_may_not_is_told(tmp_path: Path) -> None:
    new = folders(tmp_path)
    require_told(
        ("text", {"folder": next(new), "user": NOBODY}, errno.EACCES, "made"),
        ("sqlite", {"folder": (at := next(new)), "user": NOBODY}, errno.EACCES, at),
        ("records", {"folder": next(new), "user": NOBODY}, errno.EACCES, "made"),
        ("lock", {"folder": next(new), "user": NOBODY}, errno.EACCES, "made"),
        ("process", {"folder": next(new), "user": NOBODY, "NPROC": 1}, errno.EAGAIN, ""),
    )


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        new = folders(tmp_path)
        require_told(
            *((kind, {"folder": next(new)}, errno.ENOSPC, "made/") for kind in WRITERS),
            ("sqlite", {"folder": next(new)}, errno.ENOSPC, str(tmp_path)),
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_mistake_in_the_code_is_no_fault_of_the_machine() -> None:
    for error in (ValueError("x"), KeyError(28), FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("x")):
        assert fault_line(error) is None


def test_a_fault_is_found_below_what_a_library_makes_of_it(tmp_path: Path) -> None:
    try:
        try:
            with replacing(tmp_path / "out"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("cannot save") from error
    except RuntimeError as error:
        line = fault_line(error)
    assert line is not None
    assert line.startswith(f"{tmp_path / 'out'}: No space left on device (")
    for words in (
        "PytorchStreamWriter failed writing file data/1: file write failed",
        "[enforce fail] Cannot allocate memory",
    ):
        assert fault_line(RuntimeError(words)) is not None


def test_what_was_being_written_is_known_in_another_process_too(tmp_path: Path) -> None:
    try:
        with writing(tmp_path / "outer"), writing(tmp_path / "inner"):
            raise OSError(errno.EFBIG, "too large")
    except OSError as error:
        line = fault_line(pickle.loads(pickle.dumps(error)))
    assert line is not None
    assert line.startswith(f"{tmp_path / 'inner'}: File too large (")


def test_what_is_written_does_not_go_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("out", "out.partial"):
        (tmp_path / "mine" / name).write_text("mine")
        (tmp_path / name).symlink_to(tmp_path / "mine" / name)
    write_text(tmp_path / "out", "made")
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == {
        "out": "mine",
        "out.partial": "mine",
    }
    assert (tmp_path / "out").read_text() == "made"
    (tmp_path / "folder").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
    assert len(list((tmp_path / "mine").iterdir())) == 2
