"""What every part of the schema is made of: sections that refuse unknown keys, and kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


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
