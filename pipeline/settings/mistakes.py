"""Mistakes in a params file, each in one line that says what is allowed."""

import difflib
import re
from typing import Any, Union, get_args

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from pipeline.settings.section import PATTERNS, Section
from pipeline.workspace.addresses import redacted
from pipeline.workspace.errors import fitted, listed, shown


def nearest(name: str, allowed: Any) -> str:
    """The end of a message about an unknown name: which one was meant, or all that are allowed."""
    close = difflib.get_close_matches(fitted(name, 100), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {listed(sorted(map(str, allowed)))}"


def explain(schema: type[Section], source: str, error: Any) -> str:
    """One line of one of pydantic's errors: file, dotted key, what is wrong, what is allowed."""
    return redacted(_explained(schema, source, error))


def _explained(schema: type[Section], source: str, error: Any) -> str:
    path = _dotted(schema, error["loc"]).removesuffix(".[key]")
    value = error["input"]
    kind = error["type"]
    where = f"{source}: {path}" if path else source
    if kind == "extra_forbidden":
        allowed = _fields_at(schema, error["loc"][:-1])
        return f"{where}: unknown key{nearest(str(error['loc'][-1]), allowed)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        allowed = re.findall(r"\w+", error.get("ctx", {}).get("expected_tags", ""))
        if not allowed:
            return f"{where}.kind: missing"
        tag = value.get("kind") if isinstance(value, dict) else value
        return f"{where}.kind: {shown(tag)} is not known{nearest(str(tag), allowed)}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {shown(value)} is not allowed; allowed: {PATTERNS[error['ctx']['pattern']]}"
    if kind == "value_error":
        return f"{where}: {error['ctx']['error']}"
    if kind == "literal_error":
        return f"{where}: {shown(value)} is not allowed; allowed: {error['ctx']['expected']}"
    return f"{where}: {error['msg'].lower()}, got {shown(value)}"


def _dotted(schema: type[Section], location: tuple[Any, ...]) -> str:
    """The key as the user wrote it: pydantic puts a union's chosen ``kind`` into the path, which is left out."""
    parts: list[str] = []
    section: Any = schema
    for part in location:
        if isinstance(part, str) and part.startswith(("function-", "constrained-", "literal[", "list[")):
            continue  # the member of a union of values
        chosen = _member(section, part)
        if chosen is not None:
            section = chosen
            continue
        parts.append(str(part))
        section = _descend(section, part)
    return ".".join(parts)


def _member(annotation: Any, kind: Any) -> type[Section] | None:
    """The member of a union of sections that has this ``kind``."""
    if isinstance(annotation, type):
        return None
    for option in _sections(annotation):
        tag = option.model_fields.get("kind")
        if tag is not None and kind in get_args(tag.annotation) and len(_sections(annotation)) > 1:
            return option
    return None


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for argument in get_args(annotation) for s in _sections(argument)]


def _descend(section: Any, part: Any) -> Any:
    if isinstance(section, type) and issubclass(section, Section):
        found = [field.annotation for name, field in section.model_fields.items() if str(part) in _written(name, field)]
        return Union[tuple(found)] if found else None
    arguments = get_args(section)
    return arguments[-1] if arguments else None


def _fields_at(schema: type[Section], location: tuple[Any, ...]) -> list[str]:
    section: Any = schema
    for part in location:
        section = _member(section, part) or _descend(section, part)
    fields = [item for option in _sections(section) for item in option.model_fields.items()]
    return [_written(name, field)[0] for name, field in fields]


def _written(name: str, field: FieldInfo) -> list[str]:
    """The keys under which a field is written, its own name first if that is one of them."""
    alias = field.validation_alias
    return [str(key) for key in alias.choices] if isinstance(alias, AliasChoices) else [str(alias or name)]
