"""An edit of what params.yaml only names, a module, a data file or a model, is seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.params import Environment, load
from pipeline.settings.policy import PretrainedPolicy
from pipeline.sources.fingerprints import of_environment, of_policy
from pipeline.sources.hashes import KNOWN, LARGE, file_hash
from pipeline.training.seed_key import training_key
from pipeline.workspace.errors import UserError

ROOT = Path(__file__).parents[1]
MINE = """
import json
from typing import TYPE_CHECKING
import gymnasium
if TYPE_CHECKING:
    import sources_test_typing
gymnasium.register(id="Mine-v0", entry_point="sources_test_mine.game:Game")
"""
GAME = """
from pathlib import Path
from . import words
from .rules import rewards
RULES = Path(__file__).with_name("rules.txt").read_text()
def later():
    import importlib
    return importlib.import_module("sources_test_helper")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of somebody's own, a module beside it, data and a model."""
    written = {
        "sources_test_mine/__init__.py": MINE,
        "sources_test_mine/game.py": GAME,
        "sources_test_mine/words.py": "",
        "sources_test_mine/rules/__init__.py": "from .rewards import *",
        "sources_test_mine/rules/rewards.py": "import numpy, bm25s, reasoning_gym",
        "sources_test_mine/rules.txt": "play fair",
        "sources_test_mine/other.py": "",
        "sources_test_mine/notes.txt": "",
        "sources_test_helper.py": "this is not Python",
        "sources_test_typing.py": "",
        "levels/easy/1.txt": "#.#",
        "levels.json": "[]",
        "model/config.json": "{}",
        "model/model.safetensors": "weights",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def section(**settings: Any) -> Environment:
    return Environment(id="sources_test_mine:Mine-v0", settings=settings)


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def test_an_environments_module_is_followed_to_all_that_it_imports_and_names_beside_it(project: Path) -> None:
    found = of_environment(section())
    assert list(found["files"]) == [
        "sources_test_helper",
        "sources_test_mine",
        "sources_test_mine.game",
        "sources_test_mine.game/rules.txt",
        "sources_test_mine.rules",
        "sources_test_mine.rules.rewards",
        "sources_test_mine.words",
    ]
    assert {"gymnasium", "numpy", "bm25s"} <= set(found["packages"])
    assert set(found["packages"]) <= {"gymnasium", "numpy", "bm25s", "reasoning_gym"}


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        ("sources_test_mine/__init__.py", True),
        ("sources_test_mine/rules/rewards.py", True),
        ("sources_test_mine/rules.txt", True),
        ("sources_test_helper.py", True),
        ("levels/easy/1.txt", True),
        ("levels.json", True),
        ("sources_test_mine/other.py", False),
        ("sources_test_mine/notes.txt", False),
        ("sources_test_typing.py", False),
        ("model/config.json", False),
    ],
)
def test_an_edit_changes_the_key_of_a_seed_if_the_environment_can_see_it(project: Path, file: str, seen: bool) -> None:
    nested = {"easy": ["./levels"], "files": {"all": str(project / "levels.json")}}
    config = load(ROOT / "params.yaml")
    config = config.model_copy(update={"environments": {"mine": section(nested=nested, text="x" * 10_000, odd="\0")}})

    def key() -> str:
        return training_key(config, "mine", "grpo", 0, ROOT / "params.yaml")

    before = key()
    assert key() == before
    append(project / file)
    assert (key() != before) == seen


def test_a_folder_that_an_environment_fills_itself_decides_nothing(project: Path) -> None:
    before = of_environment(section(cache="levels"))
    append(project / "levels/easy/1.txt")
    assert of_environment(section(cache="levels")) == before
    assert of_environment(section(names=".", above=".."))["files"] == before["files"]


def test_environments_of_libraries_have_the_librarys_version(project: Path) -> None:
    pytest.importorskip("reasoning_gym")
    found = of_environment(Environment(id="actfocus/ReasoningGym-v1"))
    assert "reasoning_gym" in found["packages"]
    assert found["files"] == {}
    assert "reasoning_gym" not in of_environment(Environment(id="actfocus/FrozenLake-v1"))["packages"]


@pytest.mark.parametrize("name", ["nowhere_at_all:Mine-v0", "Nothing-v9", "json:Mine-v0", "sources_test_helper:A-v0"])
def test_what_cannot_be_found_or_read_is_left_to_making_the_environment(project: Path, name: str) -> None:
    found = of_environment(Environment(id=name))
    assert set(found["files"]) == ({"sources_test_helper"} if "helper" in name else set())


def test_a_local_models_files_count_and_a_models_name_on_the_hub_has_none(project: Path) -> None:
    local = PretrainedPolicy(kind="pretrained", model="model")
    before = of_policy(local)
    assert list(before["files"]) == ["config.json", "model.safetensors"]
    append(project / "model/model.safetensors")
    assert of_policy(local) != before
    assert of_policy(PretrainedPolicy(kind="pretrained", model="somebody/some-model"))["files"] == {}


def test_a_file_that_cannot_be_read_is_one_line(project: Path) -> None:
    with pytest.raises(UserError, match=r"^nothing: cannot be read: No such file or directory$"):
        file_hash(Path("nothing"))


def rewritten(path: Path) -> None:
    """Other bytes, of the same number and with the same time of writing."""
    status = path.stat()
    path.write_bytes(b"b" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file under the name, with the same number of bytes and the same time of writing."""
    other = path.with_name("other")
    other.write_bytes(b"c" * path.stat().st_size)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("edit", [rewritten, replaced])
def test_a_large_file_is_read_once_while_it_is_untouched_and_again_after_any_edit(
    project: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Path], None]
) -> None:
    large = project / "large"
    large.write_bytes(b"a" * LARGE)
    before = file_hash(large)
    assert not KNOWN.exists(), "it could still be written to within the same tick"
    monkeypatch.setattr("pipeline.sources.hashes.TICK", -1)
    assert file_hash(large) == before
    assert KNOWN.exists()
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert file_hash(large) == before
    edit(large)
    assert file_hash(large) != before
