"""The shape of the project: imports point one way, and the documents say what is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.config import parse, read_yaml
from pipeline.presets import overlay
from pipeline.training.result import SOURCES

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at whatever depth."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_importing(package: str) -> set[str]:
    return {
        file.relative_to(PIPELINE).parts[0]
        for file in PIPELINE.rglob("*.py")
        if any(name == package or name.startswith(package + ".") for name in imports(file))
    }


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("mlflow", {"tracking"}),
        ("lightning", {"training"}),
        ("optuna", {"sweep"}),
        ("dvc", set()),
        ("matplotlib", {"report", "sweep"}),
        ("stages", set()),
    ],
)
def test_only_its_own_folder_imports_a_heavy_package(package: str, allowed: set[str]) -> None:
    assert files_importing(package) <= allowed


def test_the_objective_knows_tensors_and_settings_alone() -> None:
    known = ("torch", "jaxtyping", "numpy", "math", "typing", "dataclasses", "__future__", "collections", "argparse")
    own = ("pipeline.objective", "pipeline.config", "pipeline.section", "pipeline.slots", "pipeline.trajectory")
    for file in (PIPELINE / "objective").glob("*.py"):
        for name in imports(file):
            named = name.split(".")[0] in known or name.startswith(own) or name == "pipeline"
            assert named, f"{file.name} imports {name}"
    loaded = "import sys, pipeline.objective.methods; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "pipeline"} <= set(result.stdout.split())
    assert {"lightning", "mlflow", "transformers", "dvc"}.isdisjoint(result.stdout.split())


LAYERS = (
    {"section"},
    {"slots", "studies"},
    {"config", "trajectory", "randomness", "files", "kernels"},
    {"environments", "prompting", "policy", "processes", "presets", "contracts", "episodes"},
    {"rollout", "energy", "objective"},
    {"tracking"},
    {"training", "evaluation", "report", "replay", "decisions"},
    {"sweep"},
)


def test_imports_point_one_way() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    for file in PIPELINE.rglob("*.py"):
        own = file.relative_to(PIPELINE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in level:
                assert level[parts[1]] <= level[own], f"{file.relative_to(ROOT)} imports {name}"


def test_a_seeds_key_and_the_train_stage_depend_on_the_same_code() -> None:
    deps = read_yaml(ROOT / "dvc.yaml")["stages"]["train"]["deps"]
    assert {dep for dep in deps if dep.startswith("pipeline/")} == {f"pipeline/{source}" for source in SOURCES}


def test_every_yaml_block_of_the_readme_is_valid_on_top_of_params() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    for block in blocks:
        changes = YAML(typ="safe").load(block)
        parse(overlay(read_yaml(ROOT / "params.yaml"), changes), "README.md")


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M))
    assert named
    assert named <= targets


def test_paths_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:pipeline|stages|tests|presets|docs)/[A-Za-z0-9_./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((docs/[^)]+)\)", text):
        assert (ROOT / path).exists(), path


def test_no_lock_file_is_in_git() -> None:
    """Without a shared remote it would only make every clone's `dvc repro` a change."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    tracked = subprocess.run(["git", "ls-files", "*dvc.lock"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout == ""


@pytest.mark.xdist_group("browser")
def test_a_group_of_tests_has_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells by the end of a test's id; a pytest that does not let it write there has no groups."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("needs --dist loadgroup, as in `make test`")
    assert request.node.nodeid.endswith("@browser")
