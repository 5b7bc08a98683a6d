"""A token weight outside the package, named in params.yaml, from the first stage to the comparison and a sweep."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline.settings.presets import overlay
from pipeline.workspace.yaml_files import read_yaml
from tests.commands import complaints, forked_stages
from tests.test_method_documents import block_of
from tests.test_own_environment import BANDIT, ROOT, SCRATCH, TOY, environment, run_forked

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

KEY = "method.weight.settings.strength"
METHODS = ("grpo", "unsure", "unsure_shuffled")


def write_params(folder: Path, name: str, changes: dict[str, Any]) -> None:
    """The project's params.yaml at toy size, under the handbook's block."""
    raw = read_yaml(ROOT / "params.yaml") | {"environments": {"bandit": BANDIT}, "policy": SCRATCH, "methods": {}}
    raw |= {"compare": {}, "sweep": {"trials": 2, "seeds": [100], "constraints": {}}}
    for change in (TOY, block_of("unsure"), changes):
        raw = overlay(raw, change)
    with (folder / name).open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(raw, file)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with unsure.py and params.yaml, after all stages and a sweep of two trials."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy2(ROOT / "docs" / "examples" / "unsure.py", folder)
    write_params(folder, "params.yaml", {})
    played = ["--environment", "bandit"]
    run_forked(
        folder,
        ["sources"],
        ["policy"],
        *([stage, *played] for stage in ("rollout", "annotate", "bottleneck")),
        *(["train", *played, "--method", name] for name in METHODS),
        *(["evaluate", *played, "--method", name] for name in (*METHODS, "reference")),
        ["compare"],
        ["sweep", "--study", "unsure"],
    )
    return folder


def test_one_block_gives_a_comparison_with_its_uniform_counterpart_and_its_shuffled_control(project: Path) -> None:
    rows = {row["method"]: row for row in json.loads((project / "reports" / "comparison.json").read_text())["rows"]}
    assert set(rows) == {*METHODS, "reference"}
    assert rows["unsure"]["difference_to_uniform"] is not None
    assert rows["unsure"]["difference_to_control"] is not None
    assert rows["unsure"]["custom"]["weight"]["settings"] == {"strength": 0.5}
    assert "custom" not in rows["grpo"]
    for file in ("index.html", "comparison.md"):
        text = (project / "reports" / file).read_text(encoding="utf-8")
        assert "weight unsure:weight (strength 0.5)" in text
        assert "weight unsure:weight (strength 0.5), shuffled" in text


def test_the_update_is_given_its_weights_and_its_control_the_same_ones_on_other_tokens(project: Path) -> None:
    weights = {}
    for name in METHODS:
        column = pq.read_table(project / "data" / "episodes" / f"bandit-{name}.parquet")["weight"].combine_chunks()
        weights[name] = np.array(column.flatten().drop_null())
    plain, own, shuffled = weights.values()
    assert set(plain) == {1.0}
    assert own.min() >= 1.0
    assert own.max() > own.min()
    np.testing.assert_array_equal(np.sort(own), np.sort(shuffled))
    assert (own != shuffled).any()


def test_its_settings_are_searched(project: Path) -> None:
    folder = project / "reports" / "sweep" / "unsure"
    with (folder / "trials.csv").open(encoding="utf-8") as file:
        strengths = [row[KEY] for row in csv.DictReader(file)]
    assert len(set(strengths)) == 2
    assert "strength" in (folder / "best.yaml").read_text(encoding="utf-8")


def test_a_mistake_is_one_line_of_the_first_stage(project: Path) -> None:
    write_params(
        project,
        "wrong.yaml",
        {"params_file": "wrong.yaml", "methods": {"unsure": {"weight": {"settings": {"srength": 1}}}}},
    )
    (done,) = forked_stages(project, environment(project), ["sources", "--params", "wrong.yaml"])
    assert (done.returncode, done.stdout) == (2, "")
    assert complaints(done.stderr) == [
        "wrong.yaml: methods.unsure.weight.settings.srength: no setting of unsure:weight; allowed: strength"
    ]
