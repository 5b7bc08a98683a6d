"""A params file's methods in words: every slot's choice, with its settings."""

from collections.abc import Mapping
from typing import Any

from pipeline.settings.method import Method
from pipeline.settings.section import Section

SLOTS = ("branching", "reward", "filter", "advantage", "weight", "aggregation", "surrogate", "regulariser")


def described(method: Method) -> dict[str, str]:
    """Each slot's choice with its settings, as in params.yaml."""
    return {slot: _written(getattr(method, slot)) for slot in SLOTS}


def method_table(methods: Mapping[str, Method], defaults: Method) -> str:
    """One paragraph per method: name, status, source, and the slots in which it differs from the defaults."""
    usual, lines = described(defaults), []
    for name, method in methods.items():
        lines.append(f"{name}  [{method.status}]  {method.source}".rstrip())
        own = {slot: text for slot, text in described(method).items() if text != usual[slot]}
        lines += [f"    {slot:<12}{text}" for slot, text in own.items()] or ["    the defaults"]
        found = f"found, KL per update on action tokens as {method.matched_to}"
        rate = f"{method.learning_rate:g}" if method.matched_to is None else found
        lines.append(f"    {'step':<12}learning_rate {rate}")
    lines += ["defaults", *(f"    {slot:<12}{text}" for slot, text in usual.items())]
    return "\n".join(lines)


def _written(section: Section | Mapping[str, Any]) -> str:
    parts = []
    for name, value in section.items() if isinstance(section, Mapping) else section:
        if name == "kind" or value == {}:
            continue
        if isinstance(value, Section | Mapping):
            parts.append(f"{name} ({_written(value)})")
        else:
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    kind = getattr(section, "kind", "")
    return f"{kind}: {', '.join(parts)}" if parts and kind else kind or ", ".join(parts)
