"""JSON files of any size, an element at a time: the release's have gigabytes."""

import json
from collections.abc import Iterator
from typing import Any

from pipeline.workspace.errors import UserError

_BLOCK = 2**20
"""Characters read at once, at least."""


def elements_of(path: str, opening: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON file that holds one list, or one object, each with its name ("" in a list).

    Raises:
        UserError: it cannot be read, or is something else; what came before has been given by then.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Stream(file, opening).elements()
    except (OSError, ValueError) as error:
        raise UserError(f"environments: {path}: {' '.join(str(error).split())}") from None


class _Stream:
    """JSON of which one element at a time is in memory."""

    def __init__(self, file: Any, opening: str) -> None:
        self.file, self.opening = file, opening
        self.buffer, self.position, self.read = "", 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def elements(self) -> Iterator[tuple[str, Any]]:
        kind, closing = ("list", "]") if self.opening == "[" else ("object", "}")
        if self._next() != self.opening:
            raise ValueError(f"is no JSON {kind}")
        self.position += 1
        while self._next() != closing:
            name = ""
            if kind == "object":
                name = self._value()
                if not isinstance(name, str) or self._next() != ":":
                    raise ValueError(f"no JSON: a name and a colon are missing {self._place()}")
                self.position += 1
            yield name, self._value()
            if self._next() == ",":
                self.position += 1
            elif self._next() != closing:
                raise ValueError(f"no JSON: a comma is missing {self._place()}")

    def _next(self) -> str:
        """The next character that is no space, which is then at ``position``."""
        while True:
            while self.position < len(self.buffer):
                if not self.buffer[self.position].isspace():
                    return self.buffer[self.position]
                self.position += 1
            if not self._more():
                raise ValueError("ends too early")

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
