"""What every part of the schema is made of: sections that refuse unknown keys, and kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
_NAME = r"^[a-z][a-z0-9_]*$"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_FOLDER = rf"^(\.|{_PART}(/{_PART})*)$"
_ABOVE = rf"^(\.|\.\.(/\.\.)*(/{_PART})*)$"
Name = Annotated[str, Field(pattern=_NAME, max_length=100)]
"""A key that stands in commands, in names of files and in dotted keys."""
Folder = Annotated[str, Field(pattern=_FOLDER, max_length=200)]
"""Path of a file or folder in the project."""
Above = Annotated[str, Field(pattern=_ABOVE, max_length=200)]
"""Path of the folder itself, or that leads upwards."""
PATTERNS = {
    _NAME: "a letter of a to z, then such letters, digits and _",
    _FOLDER: "a path in the project, of letters, digits, _, - and ., none of its parts beginning with - or .",
    _ABOVE: ". or a path that begins with .., of letters, digits, _, - and .",
}
"""What is allowed, in words."""


class ConfigError(Exception):
    """A params file that cannot be used; ``str()`` is one line per mistake."""


class Section(BaseModel):
    """A frozen section of ``params.yaml`` that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def refuse_ignored(section: Section, reason: str, *names: str) -> None:
    """A knob that has no effect is an error, unless it is left at its default (invariant 5)."""
    changed = [name for name in names if getattr(section, name) != type(section).model_fields[name].default]
    if changed:
        raise ValueError(f"{', '.join(changed)} has no effect while {reason}")
