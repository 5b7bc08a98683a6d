"""Mistakes in a params file, as a stage tells them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline.settings.params import load
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.commands import complaints
from tests.config_cases import ROOT, put


@pytest.fixture
def raw() -> dict[str, Any]:
    """params.yaml, to be spoilt."""
    raw: dict[str, Any] = read_yaml(ROOT / "params.yaml")
    return raw


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and with outputs of an earlier run."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    for output in (
        "models/policy/config.json",
        "data/trajectories/frozen_lake.parquet",
        "data/annotated/frozen_lake.parquet",
    ):
        (tmp_path / output).parent.mkdir(parents=True)
        (tmp_path / output).write_bytes(b"of an earlier run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_params(folder: Path, name: str, raw: dict[str, Any]) -> None:
    with (folder / name).open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(raw, file)


def test_a_stage_prints_one_line_per_mistake_and_exits_with_2(project: Path, raw: dict[str, Any]) -> None:
    write_params(project, "bad.yaml", put(put(raw, "rollout.groups", 0), "method_defaults.learning_rate", -1))
    before = contents(project)
    command = [sys.executable, "-m", "stages.rollout", "--params", "bad.yaml", "--environment", "frozen_lake"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "bad.yaml: rollout.groups: input should be greater than or equal to 1, got 0",
        "bad.yaml: method_defaults.learning_rate: input should be greater than 0, got -1",
    ]
    assert contents(project) == before


def refusal(
    project: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], str],
    *options: str,
) -> str:
    """The one line with which a stage, run in this process, refuses; nothing in the project has changed."""
    from pipeline.commands.cli import run

    monkeypatch.setattr(sys, "argv", ["stage", *options])
    before = contents(project)
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 2
    (line,) = complaints(capfd.readouterr().err)
    assert contents(project) == before
    return line


def test_an_unknown_method_or_environment_is_one_line(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.train import main

    line = refusal(project, capfd, monkeypatch, main, "--environment", "frozen_lake", "--method", "gpro")
    assert line.startswith("params.yaml: methods: 'gpro' is not there; allowed: ppo, grpo,")
    line = refusal(project, capfd, monkeypatch, main, "--environment", "lake", "--method", "grpo")
    assert line == "params.yaml: environments: 'lake' is not there; allowed: frozen_lake"


def test_a_missing_model_is_one_line(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any]
) -> None:
    from stages.policy import main

    for model in (str(project / "nowhere"), "./nowhere"):
        write_params(project, "params.yaml", put(raw, "policy", {"kind": "pretrained", "model": model}))
        assert refusal(project, capfd, monkeypatch, main) == f"policy: {model}: no such model directory"


def test_a_policy_that_was_not_made_yet_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.model.loading import load_trained

    config = load(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="models/policy: no such policy; run `make repro` first"):
        load_trained(Path("models/policy"), config)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "foreign", "missing"])
@pytest.mark.parametrize("stage", ["annotate", "train"])
def test_a_corrupt_table_is_one_line(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str, damage: str
) -> None:
    import importlib

    folder = "trajectories" if stage == "annotate" else "annotated"
    table = project / "data" / folder / "frozen_lake.parquet"
    if damage in ("truncated", "foreign"):
        pq.write_table(pa.table({"x": list(range(1000))}), table)
    if damage == "truncated":
        table.write_bytes(table.read_bytes()[:-20])
    if damage == "missing":
        table.unlink()
    options = ["--environment", "frozen_lake", *(["--method", "grpo"] if stage == "train" else [])]
    line = refusal(project, capfd, monkeypatch, importlib.import_module(f"stages.{stage}").main, *options)
    expected = {
        "foreign": "another version of this code wrote it, `dvc repro` makes it again: trajectory schema none found, 3 expected",
        "missing": "no such file",
    }
    assert line.startswith(f"data/{folder}/frozen_lake.parquet: {expected.get(damage, 'not a readable Parquet file')}")
