"""The params files of the project, and overlays."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.params import load, parse
from pipeline.settings.presets import overlay, preset_values, require_made, resolve_preset
from pipeline.settings.section import Section
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_text
from pipeline.workspace.yaml_files import read_yaml
from tests.config_cases import PRESETS, ROOT, sections

FILES = {
    "params.yaml": read_yaml(ROOT / "params.yaml"),
    **{f"presets/{name}/params.yaml": preset_values(name, ROOT) for name in PRESETS},
}


# ------------------------------------------------------------------------------------------- the files of the project


@pytest.mark.parametrize("file", FILES)
def test_params_file_loads(file: str) -> None:
    config = parse(FILES[file])
    assert config.params_file == file
    assert ((ROOT / file).parent / config.root).resolve() == ROOT.resolve()


@pytest.mark.parametrize("file", FILES)
def test_every_param_that_dvc_tracks_exists(file: str) -> None:
    written, config = FILES[file], parse(FILES[file])
    tracked = list(dvc_params(written))
    assert len(tracked) > 30
    for stage, source, dotted in tracked:
        assert source == file
        value, section = written, config
        for part in dotted.split("."):
            assert part in value, f"{stage}: {dotted} is not in {file}"
            assert not isinstance(section, Section) or part in type(section).model_fields, f"{stage}: {dotted}"
            value, section = value[part], section[part] if isinstance(section, dict) else getattr(section, part)


def dvc_params(params: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Stage, params file and dotted key of every ``params:`` entry of dvc.yaml, for all environments and methods."""
    for stage, entry in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        axes: dict[str, list[str]] = {}
        if "matrix" in entry:
            axes = {f"item.{axis}": names(source, params) for axis, source in entry["matrix"].items()}
        for values in itertools.product(*axes.values()):
            fixed = dict(zip(axes, values, strict=True))
            for group in entry.get("params", []):
                for source, keys in group.items():
                    for key in keys:
                        yield stage, filled(source, fixed, params), filled(key, fixed, params)


def names(reference: str, params: dict[str, Any]) -> list[str]:
    return list(params[reference.removeprefix("${").removesuffix("}")])


def filled(text: str, fixed: dict[str, str], params: dict[str, Any]) -> str:
    return re.sub(r"\$\{([^}]+)\}", lambda match: fixed.get(match[1]) or str(params[match[1]]), text)


def test_the_bottleneck_is_measured_with_and_without_the_warm_start_alone() -> None:
    raw, warm = (dict(FILES[f"presets/{name}/params.yaml"]) for name in ("smollm2_raw", "smollm2_bottleneck"))
    warm["policy"] = {key: value for key, value in warm["policy"].items() if key != "demonstrations"}
    assert {key for key in warm if warm[key] != raw[key]} == {"comparison", "out", "params_file"}


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_setting_is_documented(section: type[Section]) -> None:
    """By its own docstring; for a section, and for the ``kind`` that chooses one, by that class's."""
    assert section.__doc__
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        assert field.description or name == "kind" or is_section, f"{section.__name__}.{name}"


# ------------------------------------------------------------------------------------------------------------ overlays


def test_null_in_an_overlay_removes_a_key() -> None:
    assert overlay({"a": 1, "b": {"c": 2, "d": 3}}, {"a": None, "b": {"c": None}, "gone": None}) == {"b": {"d": 3}}


def test_overlay_merges_mappings_and_replaces_everything_else() -> None:
    base = {"a": {"b": {"c": 1, "d": 2}}, "list": [1, 2], "kept": 0}
    merged = overlay(base, {"a": {"b": {"c": 9}}, "list": [3], "new": {"x": 1}})
    assert merged == {"a": {"b": {"c": 9, "d": 2}}, "list": [3], "kept": 0, "new": {"x": 1}}
    assert base == {"a": {"b": {"c": 1, "d": 2}}, "list": [1, 2], "kept": 0}


def test_another_kind_replaces_and_the_same_kind_merges() -> None:
    base = {"policy": {"kind": "scratch", "layers": 2, "heads": 4}}
    other = {"kind": "pretrained", "model": "m"}
    assert overlay(base, {"policy": other}) == {"policy": other}
    assert overlay(base, {"policy": {"kind": "scratch", "layers": 1}})["policy"] == {**base["policy"], "layers": 1}
    assert overlay(base, {"policy": {"layers": 1}})["policy"] == {**base["policy"], "layers": 1}


def test_preset_is_resolved_beside_its_overlay_and_left_alone_when_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "presets" / "mine"
    folder.mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "overlay.yaml").write_text("train: {iterations: 3, passes: 5}\n", encoding="utf-8")
    target = resolve_preset("mine", tmp_path)
    config, written = load(target), target.stat().st_mtime_ns
    assert (config.train.iterations, config.out, config.train.passes) == (3, "presets/mine", 5)
    assert (folder / "dvc.yaml").read_text(encoding="utf-8") == (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert resolve_preset("mine", tmp_path).stat().st_mtime_ns == written
    with pytest.raises(UserError, match="presets: 'mien' is not there; allowed: mine"):
        resolve_preset("mien", tmp_path)


@pytest.mark.parametrize("edited", ["params.yaml", "dvc.yaml", "presets/mine/overlay.yaml", "presets/mine/dvc.yaml"])
def test_what_was_made_before_an_edit_is_refused(tmp_path: Path, edited: str) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy2(ROOT / name, tmp_path)
    write_text(tmp_path / "presets/mine/overlay.yaml", "train: {iterations: 3}\n")
    made = resolve_preset("mine", tmp_path)
    require_made(made, tmp_path)
    require_made(tmp_path / "params.yaml", tmp_path)
    (tmp_path / edited).write_text((tmp_path / edited).read_text().replace("iterations: ", "iterations: 1") + "# new\n")
    with pytest.raises(
        UserError, match=r"mine/\w+\.yaml: not what its overlay makes of it; run `make preset PRESET=mine`"
    ):
        require_made(made, tmp_path)


def test_presets_in_git_are_overlays() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    tracked = subprocess.run(["git", "ls-files", "presets"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout.split() == [f"presets/{name}/overlay.yaml" for name in PRESETS]
