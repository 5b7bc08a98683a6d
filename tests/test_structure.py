"""The shape of the project: imports point one way, and the documents say what is there."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.params import load
from pipeline.sources.closures import closure
from pipeline.sources.code import ASIDE, RESOLVED
from pipeline.training.seed_key import training_key
from pipeline.workspace.yaml_files import read_yaml

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
        ("dvc", {"analysis"}),
        ("ray", {"rollout"}),
        ("matplotlib", {"report", "sweep"}),
        ("simpy", {"planning"}),
        ("stages", set()),
    ],
)
def test_only_its_own_folder_imports_a_heavy_package(package: str, allowed: set[str]) -> None:
    assert files_importing(package) <= allowed


def test_the_objective_knows_tensors_and_settings_alone() -> None:
    known = ("torch", "jaxtyping", "numpy", "math", "typing", "dataclasses", "__future__", "collections")
    known += ("bisect", "importlib", "inspect")  # bounds, functions of one's own
    own = ("pipeline.objective", "pipeline.settings", "pipeline.trajectories", "pipeline.workspace")
    for file in (PIPELINE / "objective").glob("*.py"):
        for name in imports(file):
            named = name.split(".")[0] in known or name.startswith(own) or name == "pipeline"
            assert named, f"{file.name} imports {name}"
    loaded = "import sys, pipeline.objective.methods; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "pipeline"} <= set(result.stdout.split())
    assert {"lightning", "mlflow", "transformers", "dvc"}.isdisjoint(result.stdout.split())


LAYERS = (
    {"progress"},
    {"workspace"},
    {"settings"},
    {"trajectories"},
    {"environments", "model"},
    {"rollout", "energy", "objective", "bootstrap"},
    {"tracking", "contracts", "sources"},
    {"evaluation"},
    {"training"},
    {"analysis"},
    {"planning"},
    {"report"},
    {"sweep"},
    {"commands"},
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


SLOT_FILES = (
    "heads",
    "branching",
    "reward",
    "filter",
    "advantage",
    "weight",
    "aggregation",
    "surrogate",
    "regulariser",
    "method",
)


@pytest.mark.parametrize("name", SLOT_FILES)
def test_a_methods_settings_have_no_behaviour(name: str) -> None:
    """The only function there is a section's check: what settings do is in the code that reads them."""
    tree = ast.parse((PIPELINE / "settings" / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            assert isinstance(node, ast.FunctionDef), f"line {node.lineno}"
            assert node.name == "check", node.name


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions, and those for type checkers alone, are imports too."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for folder in (PIPELINE, ROOT / "stages")
        for file in folder.rglob("*.py")
    }
    imported = {name: {other for other in imports(file) if other in files} - {name} for name, file in files.items()}
    while outside := {
        name
        for name, others in imported.items()
        if not others or not any(name in further for further in imported.values())
    }:
        imported = {name: others - outside for name, others in imported.items() if name not in outside}
    assert imported == {}


def test_no_two_classes_have_one_name() -> None:
    """Nor have two aliases of types, nor an alias and a class."""
    places: dict[str, list[str]] = {}
    for file in PIPELINE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            else:
                names = []
            for name in names:
                if re.fullmatch(r"[A-Z][A-Za-z]*[a-z]", name):
                    places.setdefault(name, []).append(file.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


LONGEST_FILE, LONGEST_FUNCTION = 400, 60
LONG = ("pipeline/model/kernels", "pipeline/settings")
"""Where files may be longer: kernels, and schemas without behaviour."""


def test_no_file_and_no_function_is_long() -> None:
    found = []
    for folder in ("pipeline", "stages", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            place, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
            if text.count("\n") > LONGEST_FILE and not place.startswith(LONG):
                found.append(place)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION:
                    found.append(f"{place}: {node.name}")
    assert found == []


# ------------------------------------------------------------------------------------------- code that decides results

UNDECIDING = {
    "pipeline.commands": "arguments, messages and exit codes",
    "pipeline.tracking": "tells MLflow; ids of runs are in data/runs, which nobody depends on",
    "pipeline.progress": "tells how far work is, and how long it takes",
}
"""Packages of the project that stages import and do not depend on, and why."""
PIPELINES = ("dvc.yaml", "sweeps/dvc.yaml")
STAGES = {
    name: entry.get("do", entry)
    for file in PIPELINES
    for name, entry in read_yaml(ROOT / file)["stages"].items()
    if name != "sources"  # runs always
}


def deciding(stage: dict[str, Any]) -> dict[str, Path]:
    """Files of the project that decide what a stage writes, by module: what its script imports, at whatever depth."""
    (script,) = re.findall(r"python -m ([a-z._]+)", stage["cmd"])
    own = ("pipeline.", "stages.")
    found, _ = closure(
        script, lambda name: f"{name}.".startswith(own) and not any(f"{name}.".startswith(f"{a}.") for a in UNDECIDING)
    )
    return {name: file for name, file in found.items() if name not in ("pipeline", "stages")}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_exactly_the_folders_that_decide_what_it_writes(name: str) -> None:
    """Folders of the pipeline as a whole, and its own script."""
    needed = {Path(*file.relative_to(ROOT).parts[:2]).as_posix() for file in deciding(STAGES[name]).values()}
    listed = {dep for dep in STAGES[name]["deps"] if dep.startswith(("pipeline", "stages"))}
    assert sorted(listed) == sorted(needed)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_waits_for_the_params_file_to_be_checked(name: str) -> None:
    assert any(dep.startswith("${out}/data/sources/") for dep in STAGES[name]["deps"])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The project's code, to be edited, with a reference policy."""
    for folder in ("pipeline", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "policy").write_text("weights")
    return tmp_path


UNKEYED = {
    "stages": "copies what the trainings leave, and says so",
    "pipeline.commands": UNDECIDING["pipeline.commands"],
    "pipeline.progress": UNDECIDING["pipeline.progress"],
    "pipeline.tracking": UNDECIDING["pipeline.tracking"],
    "pipeline.sources": "makes the key",
    "pipeline.training.matching": "finds a learning rate, which is in the key",
    "pipeline.training.seeds": "puts finished trainings where the next stages look for them",
    "pipeline.settings": "what it makes of params.yaml is in the key",
    "pipeline.workspace.yaml_files": "what it reads of params.yaml is in the key",
    "pipeline.trajectories.records": "what the pages of MLflow show of episodes",
}
"""Code that the train stage imports and that a seed's key leaves out, and why."""
KEY = """
import ast, json, re
from pathlib import Path
from pipeline.settings.params import load
from pipeline.sources.closures import closure
from pipeline.training.seed_key import training_key

config = load("params.yaml")

def key():
    return training_key(config, "frozen_lake", "grpo", 0, Path("policy"))
"""
MUTATE = """
def mutated(file):
    "Its text with another number in place of its first one, or with a line more."
    text = file.read_text()
    numbers = []
    if file.suffix == ".py":
        numbers = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]
    if not numbers:
        return text + "\\n"
    node, lines = numbers[0], text.splitlines(keepends=True)
    line = lines[node.lineno - 1].encode()
    lines[node.lineno - 1] = (line[: node.col_offset] + str(node.value + 1).encode() + line[node.end_col_offset :]).decode()
    return "".join(lines)

before, unseen = key(), []
found, _ = closure("stages.train", lambda name: name.partition(".")[0] in ("pipeline", "stages"))
for name, file in found.items():
    text = file.read_text()
    file.write_text(mutated(file))
    if key() == before:
        unseen.append(name)
    file.write_text(text)
assert key() == before
print(json.dumps([sorted(found), unseen]))
"""


def scripted(folder: Path, script: str, **variables: str) -> Any:
    """What a script prints that computes keys in a copy of the project."""
    done = subprocess.run(
        [sys.executable, "-c", KEY + script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_seeds_key_changes_with_every_file_that_can_change_its_bytes(copied: Path) -> None:
    """One number is changed in each file that the train stage imports; the files that do not count are listed."""
    found, unseen = scripted(copied, MUTATE, ACTFOCUS_KERNELS="off")
    assert len(found) - len(unseen) > 40
    assert "pipeline.model.kernels.library/kernels.c" in found
    assert {name for name in found if any(f"{name}.".startswith(f"{left}.") for left in UNKEYED)} == set(unseen)
    assert set(UNKEYED) >= {*RESOLVED, *ASIDE}


def test_a_seeds_key_changes_with_a_default_that_params_yaml_leaves_to_the_schema(copied: Path) -> None:
    show = "print(json.dumps(key()))"
    without = scripted(copied, show, CC="no-such-compiler")
    assert scripted(copied, show, ACTFOCUS_KERNELS="off") == without, "kernels that cannot be built are none"
    params, schema = copied / "params.yaml", copied / "pipeline/settings/train.py"
    params.write_text(re.sub(r"\n  gradient_clip: 1.0", "", params.read_text(), count=1))
    assert scripted(copied, show, ACTFOCUS_KERNELS="off") == without
    changed = schema.read_text().replace("gradient_clip: Positive = 1.0", "gradient_clip: Positive = 2.0")
    assert changed != schema.read_text()
    schema.write_text(changed)
    assert scripted(copied, show, ACTFOCUS_KERNELS="off") != without


def test_a_seeds_key_changes_with_what_the_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(ROOT / "params.yaml")
    arguments = (config, "frozen_lake", "grpo", 0, ROOT / "params.yaml")
    before = training_key(*arguments)
    assert training_key(*arguments) == before
    monkeypatch.setattr("pipeline.sources.code.build", lambda: "another instruction set")
    assert training_key(*arguments) != before


def test_no_lock_file_is_in_git_unless_there_is_a_remote() -> None:
    """Without a shared remote it would only make every clone's `dvc repro` a change."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    tracked = subprocess.run(["git", "ls-files", "*dvc.lock"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout == "" or "remote" in (ROOT / ".dvc" / "config").read_text(encoding="utf-8")


@pytest.mark.xdist_group("browser")
def test_a_group_of_tests_has_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells by the end of a test's id; a pytest that does not let it write there has no groups."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("needs --dist loadgroup, as in `make test`")
    assert request.node.nodeid.endswith("@browser")
