"""A damaged file is noticed in one line, or made good: it is never a traceback, and never read as something else.

``ACTFOCUS_DAMAGES`` is how many damages of each sort each kind of file is tried with: 1 unless it is set.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipeline.model.kernels import library
from pipeline.training.checkpoints import saving
from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_record, remove, replacing, write_record
from pipeline.workspace.manifest import copy_whole, require_whole
from pipeline.workspace.seals import DamagedError
from tests.damages import DAMAGES, Kind, a_policy, checkpoint, kinds, read_checkpoint, unreadable

COUNT = int(os.environ.get("ACTFOCUS_DAMAGES", "1"))
KINDS = kinds()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all paths begin."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(kind: Kind, which: int) -> tuple[str, Any]:
    """What reading gives: "read" and the value, or "refused" and the line."""
    try:
        return "read", kind.read(which)
    except UserError as error:
        return "refused", str(error)
    except StopIteration:  # no checkpoint is left
        return "refused", "begins anew"


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_noticed_or_made_good(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = KINDS[name]
    for damage in DAMAGES:
        for seed in range(COUNT):
            draws = Random(f"{name} {damage.__name__} {seed}")
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            damaged, other = kind.write(0), kind.write(1)
            if name == "hashes":
                damaged = kind.write(0)  # there is one, of whoever wrote last
            before = outcome(kind, 0)
            assert before[0] == "read", (name, before)
            if name == "policy, copied":
                shutil.rmtree(damaged.parents[1] / "seed-0")
            damage(damaged, draws, other)
            changed = damaged.is_symlink() or damaged.is_dir() or not damaged.exists()
            capsys.readouterr()
            how, found = outcome(kind, 0)
            said = capsys.readouterr().err
            place = f"{name}, {damage.__name__}, {seed}: {found if how == 'refused' else said}"
            if how == "refused":
                assert len(found.splitlines()) == 1, place
                assert found == "begins anew" or damaged.name in found or changed or "manifest.json" in found, place
            else:
                assert found == before[1] or found in kind.allowed(0), place
            assert all(line.startswith("warning: ") for line in said.splitlines()), place
            assert len(said.splitlines()) <= 2, place


# ------------------------------------------------------------------------------------------------- what is gone on with


def test_of_two_damaged_checkpoints_a_training_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    last = checkpoint(0)
    newest = read_checkpoint(0)
    last.write_bytes(last.read_bytes()[:-1])
    before = read_checkpoint(0)
    assert before != newest
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {last}: ")
    assert line.endswith("; the training goes on from the checkpoint before")
    (one,) = last.parent.iterdir()
    one.write_bytes(b"x")
    with pytest.raises(StopIteration):
        read_checkpoint(0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; the training begins anew")
    assert not list(last.parent.iterdir())


def test_two_checkpoints_are_kept_and_no_third_is_on_the_disk_while_one_is_written() -> None:
    last = checkpoint(0)
    assert len(list(last.parent.iterdir())) == 2
    with saving(last.parent) as partial:
        partial.write_bytes(b"next")
        assert sorted(last.parent.iterdir()) == [last, partial]
    with pytest.raises(OSError, match="no-such"), saving(last.parent) as partial:
        partial.rename(last.parent / "no-such" / "folder")
    assert read_checkpoint(0).startswith(b"next")


def test_another_policys_folder_is_not_taken_for_this_one(tmp_path: Path) -> None:
    own, other = a_policy(0, "seed-0"), a_policy(1, "seed-0")
    shutil.rmtree(own)
    shutil.copytree(other, own)
    with pytest.raises(DamagedError, match="another one in its place"):
        require_whole(own)
    shutil.rmtree(own)
    copy_whole(other, own)
    require_whole(own)
    (own / "more.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"more\.json: not one of those"):
        require_whole(own)


def test_files_of_before_there_were_checksums_are_read_as_they_are() -> None:
    Path("old.json").write_text('{"seeds": {}}')
    assert read_record(Path("old.json")) == {"seeds": {}}


def test_a_folder_that_stands_in_a_files_place_is_replaced() -> None:
    Path("x.json/deep").mkdir(parents=True)
    write_record(Path("x.json"), {"a": 1})
    assert read_record(Path("x.json")) == {"a": 1}
    with replacing(Path("x.json")) as partial:
        partial.mkdir()
    assert Path("x.json").is_dir()


# ------------------------------------------------------------------------------------------------------ kernels' library


@pytest.fixture
def small_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of kernels that do nothing, compiled in a moment; the user's cache is in the folder, too."""
    if library._compiler() is None:
        pytest.skip("no C compiler")
    source = folder / "kernels" / "kernels.c"
    source.parent.mkdir()
    source.write_text("\n".join(f"void {name}(void) {{}}" for name in library._SIGNATURES))
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "own"))
    library.library.cache_clear()
    library.library()
    (made,) = source.parent.rglob("*.so")
    library.library.cache_clear()
    return made


def build_of() -> str:
    library.library.cache_clear()
    try:
        return library.build()
    finally:
        library.library.cache_clear()


def test_a_damaged_library_is_compiled_again_and_never_loaded(
    small_library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, name = small_library.read_bytes(), build_of()
    other = small_library.with_name("kernels-baseline-other.so")
    for damage in DAMAGES:
        for seed in range(COUNT):
            for path in (small_library, other):  # not the file itself, which this process has mapped
                remove(path)
                path.write_bytes(whole)
                path.chmod(0o700)
            if damage.__name__ == "swapped":
                library.seal_file(other, other.name)
            damage(small_library, Random(seed), other)
            if damage is unreadable and os.getuid():
                continue  # its owner may still replace it
            capsys.readouterr()
            assert build_of() == name
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1, damage.__name__
            assert said[0].startswith(f"warning: kernels: {small_library}"), said
            assert small_library.read_bytes() == whole


@pytest.mark.parametrize("open_to_all", ["file", "folder"])
def test_a_library_that_others_could_have_written_is_not_loaded(
    small_library: Path, open_to_all: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    chosen = small_library if open_to_all == "file" else small_library.parent
    chosen.chmod(0o777)
    capsys.readouterr()
    assert build_of() != "off"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: kernels: {small_library} is not loaded, it or its folder can be written to by others; compiled again"
    )
    again = [path for path in folder.rglob("*.so") if not (path.stat().st_mode | path.parent.stat().st_mode) & 0o022]
    assert len(again) == 1
    assert again[0].is_relative_to(folder / ("kernels" if open_to_all == "file" else "own"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_library_of_another_user_is_not_loaded(
    small_library: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chown(small_library if given == "file" else small_library.parent, 12345, -1)
    capsys.readouterr()
    assert build_of() != "off"
    (line,) = capsys.readouterr().err.splitlines()
    assert "belongs to user 12345; compiled again" in line


def test_where_no_folder_is_private_kernels_are_compiled_for_one_command(
    small_library: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    small_library.unlink()
    small_library.parent.chmod(0o777)
    (folder / "own" / "actfocus").mkdir(parents=True, exist_ok=True)
    (folder / "own" / "actfocus").chmod(0o777)
    capsys.readouterr()
    assert build_of() != "off"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: kernels: compiled for this command alone: ")
    assert not list(folder.rglob("*.so"))


def test_kernels_that_do_not_compile_are_named_and_so_is_what_computes(
    small_library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library.SOURCE.write_text("this is no C")
    capsys.readouterr()
    assert build_of() == "off"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: kernels: ")
    assert "does not compile: " in line
    assert line.endswith("PyTorch computes in their place, and results have keys of their own")
    assert len(line) < 1000


def test_an_error_of_a_table_is_one_of_trajectories(folder: Path) -> None:
    KINDS["trajectories"].write(0).write_bytes(b"PAR1")
    with pytest.raises(TrajectoryError):
        KINDS["trajectories"].read(0)
