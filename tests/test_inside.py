"""What is made stays in the root, and nothing is deleted that was not made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.metrics import write_metrics
from pipeline.commands.cli import configured
from pipeline.settings.presets import preset_values
from pipeline.sources.checks import check_made
from pipeline.sources.noted import drop_earlier
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import replacing, write_json, write_text
from pipeline.workspace.layout import Layout
from pipeline.workspace.manifest import write_manifest
from pipeline.workspace.ours import require_removable
from pipeline.workspace.yaml_files import read_yaml
from tests.config_cases import ROOT, put


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, and beside it a folder of somebody's."""
    folder = tmp_path / "project"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    monkeypatch.chdir(folder)
    configure()
    return folder


def configure(key: str = "workers", value: Any = 1) -> None:
    raw = put(read_yaml(ROOT / "params.yaml"), "overwrite_outside_root", False)
    Path("params.yaml").write_text(json.dumps(put(raw, key, value)), encoding="utf-8")


@pytest.mark.parametrize(
    "place", ["data", "models", "models/trained", "reports/bottleneck/deep/er", "sweeps", ".cache", ".cache/train/key"]
)
@pytest.mark.parametrize("target", ["outside", "outside/not-there", "outside/.."])
def test_a_link_that_leads_out_of_the_root_is_refused_by_name(root: Path, place: str, target: str) -> None:
    configured("params.yaml")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(root.parent / target)
    with pytest.raises(UserError) as error:
        configured("params.yaml")
    assert str(error.value).startswith(f"{place}: leads out of the root, to {(root.parent / target).resolve()}, ")
    assert "overwrite_outside_root: true in params.yaml" in str(error.value)
    assert "\n" not in str(error.value)
    configure("overwrite_outside_root", True)
    configured("params.yaml")


def test_a_link_behind_a_link_is_followed(root: Path) -> None:
    (root / "disk" / "curves").mkdir(parents=True)
    (root / "data").symlink_to("disk")
    configured("params.yaml")
    (root / "disk" / "curves" / "back").symlink_to(root / "disk")
    configured("params.yaml")
    (root / "disk" / "away").symlink_to(root.parent / "outside")
    with pytest.raises(UserError, match=r"^data/away: leads out of the root"):
        configured("params.yaml")


def test_out_may_be_no_link_out_of_the_root(root: Path) -> None:
    (root / "away").symlink_to(root.parent / "outside")
    for out in ("away", "away/deeper"):
        configure("out", out)
        with pytest.raises(UserError, match=f"^{out}: leads out of the root"):
            configured("params.yaml")


def test_a_root_holds_its_params_file(root: Path) -> None:
    configure("root", "../outside")
    with pytest.raises(UserError, match="leads out of the root"):
        configured("params.yaml")
    assert [path.name for path in (root.parent / "outside").iterdir()] == ["mine"]


def test_weights_are_handed_over_in_the_root(root: Path) -> None:
    for weights, refused in ((".cache/vllm", False), ("../outside", True), (str(root.parent / "outside"), True)):
        configure("rollout.engine", {"kind": "vllm", "weights": weights})
        if refused:
            with pytest.raises(UserError, match=f"^{weights}: leads out of the root"):
                configured("params.yaml")
        else:
            configured("params.yaml")


def made(folder: Path) -> Path:
    with replacing(folder) as partial:
        (partial / "deep").mkdir(parents=True)
        write_text(partial / "deep" / "weights", "made")
        write_manifest(partial)
    return folder


def test_a_folder_is_replaced_if_all_of_it_was_made_here(root: Path) -> None:
    folder = made(Path("models/policy"))
    made(folder)
    for name in ("notes.txt", "deep/notes.txt"):
        (folder / name).write_text("mine")
        with pytest.raises(UserError) as error:
            made(folder)
        line = f"models/policy/{name}: was not made here, and models/policy would be replaced with it; move it to another place"
        assert str(error.value) == line
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    (folder / "link").symlink_to(root.parent / "outside")
    with pytest.raises(UserError, match=r"^models/policy/link: was not made here"):
        made(folder)
    (folder / "link").unlink()
    made(folder)
    assert (root.parent / "outside" / "mine").exists()


def test_somebodys_folder_is_not_deleted(root: Path) -> None:
    Path("models/policy").mkdir(parents=True)
    made(Path("models/policy"))  # an empty one is nobody's loss
    Path("models/trained/lake-grpo/mine").mkdir(parents=True)
    Path("models/trained/lake-grpo/mine/manifest.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"mine/manifest.json: was not made here"):
        require_removable(Path("models/trained/lake-grpo"))
    assert Path("models/trained/lake-grpo/mine/manifest.json").exists()
    Path("away").symlink_to(root.parent / "outside")
    with replacing(Path("away")) as partial:
        partial.mkdir()
    assert Path("away").is_dir()
    assert not Path("away").is_symlink()
    assert (root.parent / "outside" / "mine").exists()


def test_a_policy_of_somebodys_is_refused_before_dvc_deletes_it(root: Path) -> None:
    layout, noted = Layout(Path(".")), Path("dvc.lock")
    check_made(layout, noted)
    Path("models/policy").mkdir(parents=True)
    Path("models/policy/weights").write_text("mine")
    with pytest.raises(UserError, match=r"^models/policy/weights: was not made here"):
        check_made(layout, noted)
    write_json(noted, {"schema": "2.0", "stages": {"policy": {"cmd": "x", "outs": [{"path": "models/policy"}]}}})
    check_made(layout, noted)  # made before there were lists
    write_manifest(Path("models/policy"))
    check_made(layout, noted)
    Path("models/policy/notes").write_text("mine")
    with pytest.raises(UserError, match=r"^models/policy/notes: was not made here"):
        check_made(layout, noted)


def test_of_earlier_fingerprints_only_those_that_were_written_are_removed(root: Path) -> None:
    folder = Path("data/sources")
    for name in ("methods/old", "methods/mine", "methods/new", "mine"):
        write_json(folder / f"{name}.json", {})
    write_json(folder / "names.json", ["methods/old", "methods/new", "../../params", 1, "policy"])
    drop_earlier(folder, ["methods/new", "machine"])
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    assert left == ["methods/mine.json", "methods/new.json", "mine.json", "names.json"]
    assert Path("params.yaml").exists()
    assert json.loads((folder / "names.json").read_text()) == ["machine", "methods/new"]


def test_of_earlier_metrics_only_those_of_methods_are_removed(root: Path) -> None:
    write_json(Path("reports/metrics/lake/old.json"), {"success": 0.5})
    write_json(Path("reports/metrics/lake/mine.json"), {"mine": 1})
    write_metrics({"rows": [], "temperatures": [1.0]}, {}, Path("reports"))
    assert [path.name for path in Path("reports/metrics").rglob("*.json")] == ["mine.json"]


def test_a_presets_name_is_no_path(root: Path) -> None:
    for name in ("../outside", "..", ".", "/etc", "a/b", ""):
        (root / "presets" / name).mkdir(parents=True, exist_ok=True)
        if name != "/etc":
            (root / "presets" / name / "overlay.yaml").write_text("workers: 1\n")
        with pytest.raises(UserError, match=r"presets: '.*' is not there"):
            preset_values(name, root)
