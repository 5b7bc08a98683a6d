"""After an edit of what params.yaml only names, exactly the stages whose results it decides run again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from pipeline.settings.presets import overlay
from pipeline.workspace.files import write_text
from pipeline.workspace.yaml_files import read_yaml, yaml_text

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

ROOT = Path(__file__).parents[1]
COIN = {"id": "mine:Coin-v0", "settings": {"shop": "products.json"}}
WEIGHT = {"kind": "custom", "function": "mine_weight:weight", "settings": {"table": "table.json"}}
FILES = {
    "mine.py": "import mine_words",
    "mine_words.py": "",
    "products.json": "",
    "mine_weight.py": "import mine_numbers\ndef weight(batch, *, table):\n    return batch.trainable * 1.0",
    "mine_numbers.py": "",
    "table.json": "",
    "model/config.json": "",
    "other.py": "",
}
"""The user's; the last one is named nowhere."""
CHANGES: dict[str, Any] = {
    "environments": {"coin": COIN},
    "policy": {"kind": "pretrained", "model": "model"},
    "methods": {**dict.fromkeys(("ppo", "ppo_actfocus", "ppo_matched")), "grpo_actfocus": {"weight": WEIGHT}},
    "compare": {"uniform": None, "control": None},
    "sweep": {"studies": None},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which DVC takes what lies there for the results of all stages; none but the first has run."""
    folder = tmp_path_factory.mktemp("stale")
    for part in ("pipeline", "stages"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "dvc.yaml", folder)
    raw = read_yaml(ROOT / "params.yaml")
    policy = raw.pop("policy") and CHANGES["policy"]
    write_text(folder / "params.yaml", yaml_text({**overlay(raw, CHANGES), "policy": policy}))
    for name, text in FILES.items():
        write_text(folder / name, text)
    look(folder)
    Repo.init(str(folder), no_scm=True)
    with chdir(folder), Repo() as repo:
        for out in repo.index.outs:
            path = Path(out.fs_path)
            if not path.exists():
                write_text(path if path.suffix else path / "result", "")
        repo.commit(force=True)
    return folder


def look(folder: Path) -> None:
    """Run the first stage."""
    variables = {**os.environ, "PYTHONPATH": str(folder), "ACTFOCUS_KERNELS": "off"}
    subprocess.run([sys.executable, "-m", "stages.sources"], cwd=folder, env=variables, check=True, timeout=120)


def stale(folder: Path) -> set[str]:
    """Stages that would run now."""
    look(folder)
    with chdir(folder), Repo() as repo:
        return set(repo.status()) - {"sources@params"}


METHODS = ("grpo", "grpo_actfocus", "grpo_matched")
TRAINED = {f"{stage}@coin-{method}" for stage in ("train", "evaluate") for method in METHODS}
OWN = {f"train@{place}-{method}" for place in ("coin", "frozen_lake") for method in ("grpo_actfocus", "grpo_matched")}
"""Of the method that has the function, and of the one that is matched to it."""
PLAYED = {"policy", "compare", "rollout@coin", "evaluate_reference@coin", "intervene@coin", *TRAINED}


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("mine.py", PLAYED),
        ("mine_words.py", PLAYED),
        ("products.json", PLAYED),
        ("mine_weight.py", OWN),
        ("mine_numbers.py", OWN),
        ("table.json", OWN),
        ("model/config.json", {"policy"}),
        ("other.py", set()),
    ],
)
def test_an_edit_makes_the_stages_run_again_whose_results_it_decides(project: Path, file: str, found: set[str]) -> None:
    """And what has been put back is up to date: the next file's stages are no more than its own."""
    text = (project / file).read_text()
    write_text(project / file, f"{text}\n# an edit")
    assert stale(project) == found
    write_text(project / file, text)


@pytest.mark.parametrize(
    ("method", "methods"), [("grpo_actfocus", ("grpo_actfocus", "grpo_matched")), ("grpo", ("grpo",))]
)
def test_a_method_that_is_matched_is_trained_again_after_an_edit_of_what_it_is_matched_to(
    project: Path, method: str, methods: tuple[str, ...]
) -> None:
    text = (project / "params.yaml").read_text()
    write_text(
        project / "params.yaml", yaml_text(overlay(read_yaml(project / "params.yaml"), {"methods": {method: FASTER}}))
    )
    assert stale(project) == {
        "compare",
        *(f"train@{place}-{name}" for place in ("coin", "frozen_lake") for name in methods),
    }
    write_text(project / "params.yaml", text)


FASTER = {"learning_rate": 1e-3}
