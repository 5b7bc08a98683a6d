"""Presets: overlays on params.yaml, resolved into a params file of their own that DVC can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.settings.params import parse
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_text
from pipeline.workspace.yaml_files import read_yaml, yaml_text


def resolve_preset(name: str, root: Path) -> Path:
    """Write ``presets/<name>/params.yaml``, if it has changed, and a copy of dvc.yaml beside it.

    A copy, because a link is no file in a git revision: with one, DVC could read no revision at all (`dvc metrics diff`).

    Raises:
        UserError: no such preset, or the result is not valid.
    """
    folder = root / "presets" / name
    if not (folder / "overlay.yaml").exists():
        known = sorted(path.parent.name for path in (root / "presets").glob("*/overlay.yaml"))
        raise UserError(f"presets: {name!r} is not there; allowed: {', '.join(known)}")
    for target, text in (
        (folder / "params.yaml", preset_text(name, root)),
        (folder / "dvc.yaml", (root / "dvc.yaml").read_text(encoding="utf-8")),
    ):
        if target.is_symlink() or not target.exists() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)
    return folder / "params.yaml"


def preset_text(name: str, root: Path) -> str:
    """The resolved params file as text."""
    merged = overlay(read_yaml(root / "params.yaml"), read_yaml(root / "presets" / name / "overlay.yaml"))
    merged |= {"root": "../..", "out": f"presets/{name}", "params_file": f"presets/{name}/params.yaml"}
    parse(merged, f"presets/{name}/overlay.yaml")
    return f"# Made from params.yaml and overlay.yaml by `make preset PRESET={name}`: edit those.\n" + yaml_text(merged)


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
