"""What every part of the schema is made of: sections that refuse unknown keys, and kinds of numbers."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST = 1e9
"""Largest size of a number: float32 sums and products of several such are still finite."""


def at_least(least: float) -> AfterValidator:
    """A lower bound where the arithmetic of smaller positive numbers ends; zero and below are refused as such."""

    def check(value: float) -> float:
        if value < least:
            raise ValueError(f"must be at least {least:g}, got {value:g}")
        return value

    return AfterValidator(check)


def number(value: Any) -> Any:
    """YAML's true and false are no numbers, though Python's are."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, got {str(value).lower()}")
    return value


Float = Annotated[float, BeforeValidator(number)]
Int = Annotated[int, BeforeValidator(number)]
Probability = Annotated[Float, Field(ge=0.0, le=1.0)]
Share = Annotated[Float, Field(gt=0.0, le=1.0)]
Positive = Annotated[Float, Field(gt=0.0, le=MOST)]
NonNegative = Annotated[Float, Field(ge=0.0, le=MOST)]
Number = Annotated[Float, Field(ge=-MOST, le=MOST)]
Temperature = Annotated[Float, Field(gt=0.0, le=1000.0), at_least(1e-3)]
"""What logits or scores are divided by."""
Epsilon = Annotated[Float, Field(gt=0.0, le=1.0), at_least(1e-12)]
"""Added to a divisor that may be zero."""
LearningRate = Annotated[Float, Field(gt=0.0, le=1.0), at_least(1e-7)]
"""About how far a step of Adam moves a weight: smaller ones are lost in the rounding of most weights."""
Count = Annotated[Int, Field(ge=1, le=1_000_000)]
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]
"""What every library's generator takes."""
_NAME = r"^[a-z][a-z0-9_]*$"
PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_FOLDER = rf"^(\.|{PART}(/{PART})*)$"
_ABOVE = rf"^(\.|\.\.(/\.\.)*(/{PART})*)$"
_ADDRESS = r"^https?://[^\s/?#]+$"
_CLUSTER = r"^(auto|[A-Za-z0-9._-]+:[0-9]{1,5})$"
_FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
Name = Annotated[str, Field(pattern=_NAME, max_length=100)]
"""A key that stands in commands, in names of files and in dotted keys."""
Folder = Annotated[str, Field(pattern=_FOLDER, max_length=200)]
"""Path of a file or folder in the project."""
Above = Annotated[str, Field(pattern=_ABOVE, max_length=200)]
"""Path of the folder itself, or that leads upwards."""
Address = Annotated[str, Field(pattern=_ADDRESS, max_length=200)]
"""Of a server."""
Function = Annotated[str, Field(pattern=_FUNCTION, max_length=200)]
"""A function of a module."""
Cluster = Annotated[str, Field(pattern=_CLUSTER, max_length=200)]
"""Of Ray's."""
PATTERNS = {
    _NAME: "a letter of a to z, then such letters, digits and _",
    _FOLDER: "a path in the project, of letters, digits, _, - and ., none of its parts beginning with - or .",
    _ABOVE: ". or a path that begins with .., of letters, digits, _, - and .",
    _ADDRESS: "http://host:port",
    _CLUSTER: "host:port, or auto",
    _FUNCTION: "module:name of a function",
}
"""What is allowed, in words."""


class Section(BaseModel):
    """A frozen section of ``params.yaml`` that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """What settings ask of one another; raises a ``ValueError`` that says what is allowed."""

    def refuse_ignored(self, reason: str, *names: str) -> None:
        """A knob that has no effect is an error, unless it is left at its default (invariant 5)."""
        changed = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"{', '.join(changed)} has no effect while {reason}")

    def refuse_repeated(self, *names: str) -> None:
        """The values of a list must be distinct."""
        for name in names:
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must be distinct, got {values}")
