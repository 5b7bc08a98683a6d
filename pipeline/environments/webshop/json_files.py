"""JSON files of any size, an element at a time: the release's have gigabytes."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from pipeline.workspace.errors import UserError

_BLOCK = 2**20
"""Characters read at once, at least."""
_SOLID = re.compile(r"\S")


def elements_of(path: str, opening: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON file that holds one list, or one object, each with its name ("" in a list).

    Raises:
        UserError: it cannot be read, or is something else; what came before has been given by then.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Stream(file).elements(opening)
    except (OSError, ValueError) as error:
        raise UserError(f"environments: {path}: {' '.join(str(error).split())}") from None


class _Stream:
    """JSON of which one element at a time is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.buffer, self.position, self.read = "", 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def elements(self, opening: str) -> Iterator[tuple[str, Any]]:
        kind, closing = ("list", "]") if opening == "[" else ("object", "}")
        if not self._passed(opening):
            raise ValueError(f"is no JSON {kind}")
        while self._next() != closing:
            name = "" if kind == "list" else self._value()
            if kind == "object" and not (isinstance(name, str) and self._passed(":")):
                raise ValueError(f"no JSON: a name and a colon are missing {self._place()}")
            yield name, self._value()
            if not self._passed(",") and self._next() != closing:
                raise ValueError(f"no JSON: a comma is missing {self._place()}")

    def _passed(self, character: str) -> bool:
        """Whether this one comes next, and is left behind."""
        found = self._next() == character
        self.position += found
        return found

    def _next(self) -> str:
        """The next character that is no space, which is then at ``position``."""
        while not (found := _SOLID.search(self.buffer, self.position)):
            self.position = len(self.buffer)
            if not self._more():
                raise ValueError("ends too early")
        self.position = found.start()
        return found[0]

    def _value(self) -> Any:
        self._next()
        while True:
            wrong, complete = "", False
            try:
                value, end = self.decode(self.buffer, self.position)
                if end < len(self.buffer):  # a number at the buffer's end may go on
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if error.pos < len(self.buffer) and not error.msg.startswith("Unterminated string"):
                    wrong = f"no JSON: {error.msg} at character {self.read + error.pos}"
                    complete = error.pos < len(self.buffer) - 8  # so long is the longest word or escape
            except RecursionError:
                wrong, complete = f"nested too deeply {self._place()}", True
            if complete or not self._more():
                raise ValueError(wrong or "ends too early")

    def _more(self) -> bool:
        """Read on, twice as much as is waiting; what is done with is let go."""
        block = self.file.read(max(_BLOCK, 2 * (len(self.buffer) - self.position)))
        self.read += self.position
        self.buffer, self.position = self.buffer[self.position :] + block, 0
        return bool(block)

    def _place(self) -> str:
        return f"at character {self.read + self.position}"
