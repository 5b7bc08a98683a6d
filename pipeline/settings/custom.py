"""A choice of one's own: a function outside the package, named in params.yaml, with settings of its own."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.settings.section import Function, Section


class Custom(Section):
    """What ``kind: custom`` has in every slot that takes it; pipeline/objective/custom.py says what its function returns."""

    slot: ClassVar[str]
    """The key under which it stands in a method."""
    given: ClassVar[tuple[str, ...]]
    """What the slot gives the function by position; its settings follow as keyword arguments."""
    kind: Literal["custom"]
    function: Function
    """``module:name``. The module is found from the project's root or on PYTHONPATH."""
    settings: dict[str, Any] = Field(default={})
    """Keyword arguments of the function. Those that it has no default for must be here."""

    def __init_subclass__(cls, slot: str, given: tuple[str, ...] = ("batch",), **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.slot, cls.given = slot, given


def custom_sections(method: Iterable[tuple[str, Any]]) -> dict[str, Custom]:
    """A method's choices of one's own, by slot."""
    return {slot: section for slot, section in method if isinstance(section, Custom)}
