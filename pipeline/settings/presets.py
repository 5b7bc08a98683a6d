"""Presets: overlays on params.yaml, resolved into a params file of their own that DVC can read."""

import re
from pathlib import Path
from typing import Any

from pipeline.settings.params import Config, parse
from pipeline.settings.section import PART
from pipeline.workspace.errors import UserError, listed, shown
from pipeline.workspace.files import read_bytes, write_text
from pipeline.workspace.yaml_files import read_yaml, yaml_text


def resolve_preset(name: str, root: Path) -> Path:
    """Write ``presets/<name>/params.yaml``, if it has changed, and a copy of dvc.yaml beside it.

    Git has neither, so that none is ever old there. They are not ignored either: DVC reads no dvc.yaml that Git ignores,
    and a revision of a preset's results needs both.

    Raises:
        UserError: no such preset, or the result is not valid.
    """
    folder = root / "presets" / name
    for file, text in made_files(name, root).items():
        target = folder / file
        if not target.is_file() or target.read_bytes() != text.encode():
            write_text(target, text)
    return folder / "params.yaml"


def made_files(name: str, root: Path) -> dict[str, str]:
    """What is made for a preset in its folder, by name of the file.

    Raises:
        UserError: no such preset, or its settings are not valid.
    """
    load_preset(name, root)
    head = f"# Made from params.yaml and overlay.yaml by `make preset PRESET={name}`: edit those.\n"
    return {
        "params.yaml": head + yaml_text(preset_values(name, root)),
        "dvc.yaml": (root / "dvc.yaml").read_text(encoding="utf-8"),
    }


def require_made(params_file: Path, root: Path) -> None:
    """Refuse a preset's made files if they are not what would be made now: their results would be old ones.

    Raises:
        UserError: they differ.
    """
    folder = params_file.parent
    if not (folder / "overlay.yaml").exists():
        return
    for file, text in made_files(folder.name, root).items():
        if read_bytes(folder / file) != text.encode():
            raise UserError(
                f"{folder / file}: not what its overlay makes of it; run `make preset PRESET={folder.name}`"
            )


def load_preset(name: str, root: Path) -> Config:
    """A preset's checked settings, whether its files have been made or not.

    Raises:
        UserError: no such preset, or its settings are not valid.
    """
    return parse(preset_values(name, root), f"presets/{name}/overlay.yaml")


def preset_values(name: str, root: Path) -> dict[str, Any]:
    """params.yaml with a preset's overlay laid over it.

    Raises:
        UserError: no such preset.
    """
    changes = root / "presets" / name / "overlay.yaml"
    if not re.fullmatch(PART, name) or not changes.exists():
        known = sorted(path.parent.name for path in (root / "presets").glob("*/overlay.yaml"))
        raise UserError(f"presets: {shown(name)} is not there; allowed: {listed(known, 240)}")
    below, above = read_yaml(root / "params.yaml"), read_yaml(changes)
    for file, values in ((root / "params.yaml", below), (changes, above)):
        if not isinstance(values, dict):
            raise UserError(f"{file}: must be a mapping of settings, got {type(values).__name__}")
    merged: dict[str, Any] = overlay(below, above)
    return merged | {"root": "../..", "out": f"presets/{name}", "params_file": f"presets/{name}/params.yaml"}


def overlay(base: Any, changes: Any) -> Any:
    """Merge mappings key by key. Null removes a key; a mapping of another ``kind`` replaces the one below it."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = overlay(base.get(key), value)
    return merged
