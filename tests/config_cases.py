"""Params files and how a stage is called on them, for tests of mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pipeline.settings.section import Section

ROOT = Path(__file__).parents[1]


PRESETS = sorted(path.parent.name for path in (ROOT / "presets").glob("*/overlay.yaml"))


def put(raw: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """The params with one key changed or added."""
    changed = copy.deepcopy(raw)
    *path, last = dotted.split(".")
    section: Any = changed
    for part in path:
        section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
    section[last] = value
    return changed


def sections(section: type[Section] = Section) -> list[type[Section]]:
    return [
        s
        for child in section.__subclasses__()
        if child.__module__.startswith("pipeline.settings.") and child.__module__ != "pipeline.settings.sweep"
        for s in [child, *sections(child)]
    ]
