"""Results go to a remote of DVC's, a folder or an S3 server, and come back whole in a fresh clone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.settings.presets import resolve_preset
from pipeline.workspace.files import write_text
from tests.clones import IDENTITY, ROOT, call, clone
from tests.shared_stores import BUCKET, KEYS, objects, s3_server
from tests.tracked import Server

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

PIPELINE = "presets/smoke/dvc.yaml"
RESULTS = ("data", "models", "reports")
SAID = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), flags=re.S)
"""Commands of docs/scaling.md: first how results are pushed, then how they are pulled."""


@pytest.fixture(scope="module", autouse=True)
def _no_kernels() -> Iterator[None]:
    """What is compiled here computes nothing, and takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTFOCUS_KERNELS", "off")
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the first stage has run, and in which DVC takes small files for the results of all others."""
    folder = clone(tmp_path_factory.mktemp("shared") / "one")
    resolve_preset("smoke", folder)
    call(folder, "dvc", "repro", f"{PIPELINE}:sources@params")
    with chdir(folder), Repo() as repo:
        for out in (out for stage in repo.index.stages if stage.path_in_repo == PIPELINE for out in stage.outs):
            path = Path(out.fs_path)
            if not path.exists():
                write_text(path if path.suffix else path / "result", f"of {path.name}")
        repo.commit(PIPELINE, force=True)
    return folder


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def results(folder: Path) -> dict[str, bytes]:
    """Every file that the stages have left."""
    found = sorted(path for part in RESULTS for path in (folder / "presets/smoke" / part).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def typed(folder: Path, commands: str) -> str:
    """What the commands of a document print."""
    lines = commands.replace("git commit", f"git {' '.join(IDENTITY)} commit")
    return call(folder, "bash", "-ec", lines).stdout


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_a_fresh_clone_that_pulls_has_nothing_to_reproduce(
    kind: str, project: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, pull = SAID[:2]
    (tmp_path / "remote").mkdir()
    if kind == "folder":
        add, _, *others = push.splitlines()
        push = "\n".join([add.replace(f"s3://{BUCKET}/dvc", str(tmp_path / "remote")), *others])
    else:
        server = request.getfixturevalue("s3")
        push = push.replace("http://127.0.0.1:8333", server.uri)
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
    one, other = tmp_path / "one", tmp_path / "other"
    call(tmp_path, "cp", "-a", str(project), str(one))
    typed(one, push)
    there = objects(server, "dvc/") if kind == "s3" else results_of_remote(tmp_path / "remote")
    assert len(there) > 20
    assert all(re.match(r"files/md5/[0-9a-f]{2}/", name) for name in there)

    call(tmp_path, "git", "clone", "-q", str(one), str(other))
    assert results(other) == {}
    output = typed(other, pull)
    assert results(other) == results(one)
    ran = re.findall(r"Running stage '[^']*:([^':]+)'", output)
    assert ran == ["sources@params"]
    assert len(re.findall(r"^Stage .* didn't change, skipping$", output, flags=re.M)) > 10
    assert call(other, "git", "status", "--porcelain").stdout == "", "not even a hash in dvc.lock is another one"


def results_of_remote(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
