"""Small output files with stable bytes, replaced at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, one trailing newline, no NaN; an existing file is replaced at once."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ConfigError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; an existing file is replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
