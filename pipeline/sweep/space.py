"""From a search space to Optuna's distributions, and from a draw back to a params file."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import Trial

from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay
from pipeline.settings.sweep import Choice, Integer, Logarithmic, LogarithmicFromZero, Space, Uniform, Value
from pipeline.workspace.errors import UserError

METHOD = "method."
"""Opens a key of the searched method's own section."""
SEARCHABLE = (METHOD, "train.", "rollout.")
"""What keys may open with: everything else would change what trials are measured by, or the reference policy."""


def to_value(space: Space, drawn: Any) -> Value:
    """The setting that a draw stands for; floats to six significant digits, so that an overlay holds all of it."""
    match space:
        case Uniform() | Logarithmic():
            return min(max(_six(drawn), space.low), space.high)
        case LogarithmicFromZero():
            value = space.scale * math.expm1(drawn * math.log1p(space.high / space.scale))
            return min(_six(value), space.high)
        case _:
            return drawn  # type: ignore[no-any-return]


def from_value(space: Space, value: Any) -> Any:
    """The draw that stands for a setting, to try it on purpose.

    Raises:
        ValueError: the setting is outside the space.
    """
    if isinstance(space, Choice):
        if value not in space.values:
            raise ValueError(f"{value!r} is not among {space.values}")
        return value
    low, high = (0.0 if isinstance(space, LogarithmicFromZero) else space.low), space.high
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{value!r} is not in [{low:g}, {high:g}]")
    if isinstance(space, Integer) and value != int(value):
        raise ValueError(f"{value!r} is not a whole number")
    if isinstance(space, LogarithmicFromZero):
        return math.log1p(value / space.scale) / math.log1p(space.high / space.scale)
    return int(value) if isinstance(space, Integer) else float(value)


def suggest(trial: Trial, spaces: Mapping[str, Space]) -> dict[str, Value]:
    """Draw every key of a space for a trial."""
    return {key: to_value(space, _draw(trial, key, space)) for key, space in spaces.items()}


def changes(raw: Mapping[str, Any], method: str, values: Mapping[str, Value]) -> dict[str, Any]:
    """An overlay of params.yaml that gives a method these values.

    A slot that the method inherits from ``method_defaults`` is written out, because it is inherited whole or not at all.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = _path(key, method)
        place = result
        for depth, part in enumerate(parents):
            if depth == 2 and key.startswith(METHOD) and part not in (raw["methods"][method] or {}):
                place.setdefault(part, copy.deepcopy(dict(raw["method_defaults"][part])))
            place = place.setdefault(part, {})
        place[last] = value
    return result


def configured(raw: Mapping[str, Any], method: str, values: Mapping[str, Value], source: str) -> Config:
    """The params file with these values.

    Raises:
        UserError: the schema refuses them.
    """
    return parse(overlay(dict(raw), changes(raw, method, values)), source)


def current(config: Config, method: str, key: str) -> Value:
    """The value that a key of a search space has in params.yaml.

    Raises:
        UserError: there is no such setting, or it is a section.
    """
    if not key.startswith(SEARCHABLE):
        raise UserError(f"{key}: cannot be searched; allowed: keys of {', '.join(p.rstrip('.') for p in SEARCHABLE)}")
    found: Any = config.model_dump(mode="json")
    for part in _path(key, method):
        if not isinstance(found, dict) or part not in found:
            allowed = ", ".join(found) if isinstance(found, dict) else "nothing, it is no section"
            raise UserError(f"{key}: {part!r} is no setting of {method}; allowed there: {allowed}")
        found = found[part]
    if isinstance(found, dict | list):
        raise UserError(f"{key}: a section, not a setting; name one of {', '.join(map(str, found))}")
    return found  # type: ignore[no-any-return]


def _path(key: str, method: str) -> Sequence[str]:
    dotted = f"methods.{method}.{key.removeprefix(METHOD)}" if key.startswith(METHOD) else key
    return dotted.split(".")


def _draw(trial: Trial, key: str, space: Space) -> Any:
    """What Optuna draws; of ``log_from_zero`` it is the uniform number u in [0, 1]."""
    match space:
        case Uniform() | Logarithmic():
            return trial.suggest_float(key, space.low, space.high, log=isinstance(space, Logarithmic))
        case LogarithmicFromZero():
            return trial.suggest_float(key, 0.0, 1.0)
        case Integer():
            return trial.suggest_int(key, space.low, space.high)
        case Choice():
            return trial.suggest_categorical(key, space.values)


def _six(value: float) -> float:
    return float(f"{value:.6g}")
