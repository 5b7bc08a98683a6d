"""YAML as this project reads and writes it: without aliases, so that an edit of one place changes one place.

`dvc exp run -S` and other tools edit what an alias stands for, and with it, silently, every other place that shares it.
"""

import io
import itertools
import math
import stat
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from pipeline.workspace.addresses import redacted
from pipeline.workspace.errors import MOST_MISTAKES, UserError, line_of, mistakes, shown

WRITE_OUT = "an edit of its values would change every place that shares them: write them out here"
LARGEST = 64 * 1024
"""Bytes of a file: parsed in half a second."""
DEEPEST = 32
"""Mappings and lists in one another: the time of parsing grows with the square."""
LARGEST_LOCK = 16 * 2**20
"""Bytes of a dvc.lock, which has all settings that every stage has read."""
BYTES_A_VALUE = 10
"""A file may have a key or value for each so many bytes that it may have: 0.1 ms each."""
LONGEST_KEY = 500
"""Characters of a key."""
GREATEST = 2**64
"""A whole number is smaller."""


class _Aliased(Exception):
    """Has the dotted key and the anchor of every alias."""


class _Plain(Composer):
    """Stops at more keys and values than ``most``, and at the end if there are aliases."""

    def __init__(self, most: int, loader: Any = None) -> None:
        super().__init__(loader)
        self.most, self.values = most, 0

    def compose_document(self) -> Any:
        root = super().compose_document()
        if aliased := list(_aliases(root)):
            raise _Aliased(aliased)
        return root

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.values += 1
        if self.values > self.most:
            raise ComposerError(None, None, f"more than {self.most} keys and values")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path, largest: int = LARGEST) -> Any:
    """Parse a YAML 1.2 file of plain values (``1e-4`` is a number), within about a second.

    Raises:
        UserError: the file is missing, larger than so many bytes, or not what ``parse_yaml`` takes.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path}: not a file")
        with Path(path).open("rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(content, str(path), largest)


def parse_yaml(content: bytes, name: str, largest: int = LARGEST) -> Any:
    """Parse the content of a YAML 1.2 file of plain values; in errors it has this name.

    Raises:
        UserError: it is larger than so many bytes, not YAML, too deep, or has aliases, dates or other values that are neither
            text, number, true, false, null, list nor mapping; a line for each.
    """
    if len(content) > largest:
        raise UserError(f"{name}: too large; allowed: at most {largest // 1024} KiB")
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = DEEPEST
    yaml.Composer = partial(_Plain, largest // BYTES_A_VALUE)  # type: ignore[assignment]  # it is only called
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of anchors that nothing refers to
            value = yaml.load(content.decode("utf-8"))
    except _Aliased as found:
        raise mistakes(f"{name}: {key}: *{anchor} is an alias; {WRITE_OUT}" for key, anchor in found.args[0]) from None
    except Exception as error:  # a wrong tag may raise whatever Python does of what stands behind it
        raise mistakes([f"{name}: not valid YAML: {_why(error)}"]) from None
    if foreign := list(itertools.islice(_foreign(value, ()), MOST_MISTAKES + 1)):
        raise mistakes([f"{name}: {line}" for line in foreign])
    return value


def _why(error: Exception) -> str:
    """Where a file is wrong, and why."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if isinstance(error, RecursionError) or "maximum depth" in str(error):
        return f"more than {DEEPEST} mappings and lists in one another"
    if not isinstance(error, MarkedYAMLError):
        return line_of(error) if isinstance(error, YAMLError) else f"a value is not of its tag ({line_of(error)})"
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    said = ": ".join(part for part in (error.context, error.problem) if part)
    return redacted(f"{where}{' '.join(said.split())}")


def _foreign(value: Any, place: tuple[str, ...]) -> Iterator[str]:
    """A line for each value that is not plain, with its dotted key."""
    where = f"{'.'.join(place)}: " if place else ""
    if type(value) is dict:
        for key, part in value.items():
            if isinstance(key, str) and len(key) > LONGEST_KEY:
                yield f"{where}the key {shown(key)} is too long; allowed: {LONGEST_KEY} characters"
            elif isinstance(key, str) and not _unwritable(key):
                yield from _foreign(part, (*place, key))
            else:
                yield f"{where}the key {shown(key)} is not text; allowed: text, in quotes if need be"
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _foreign(part, (*place, str(index)))
    elif isinstance(value, str):
        if found := _unwritable(value):
            yield f"{where}has the character U+{ord(found):04X}; allowed: text without control characters"
    elif isinstance(value, int) and abs(value) >= GREATEST:
        yield f"{where}{shown(value, 40)} is not allowed; allowed: whole numbers below 2 ** 64"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}input should be a finite number, got {value}"
    elif not (value is None or isinstance(value, int | float)):
        yield (
            f"{where}{shown(value)} is not allowed; allowed: text (dates in quotes), numbers, true, false, null, lists "
            "and mappings"
        )


def _unwritable(text: str) -> str | None:
    """The first character that no file of text has: a control character, or half of one."""
    return next((c for c in text if (c < " " and c not in "\t\n\r") or "\ud800" <= c <= "\udfff"), None)


def yaml_text(values: Any) -> str:
    """Plain values as YAML without aliases, in blocks and in the order of their keys."""
    yaml, stream = YAML(), io.StringIO()
    yaml.width, yaml.default_flow_style = 120, False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.dump(values, stream)
    return stream.getvalue()


def _aliases(root: Node) -> Iterator[tuple[str, str]]:
    """Dotted key and anchor of every alias, in their order; composed, an alias is a node that has been met before."""
    met: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Node]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if id(node) in met:
            yield ".".join(path), node.anchor
            continue
        met.add(id(node))
        below: list[tuple[str, Node]] = []
        if isinstance(node, MappingNode):
            below = [(str(key.value), part) for key, value in node.value for part in (key, value)]
        elif isinstance(node, SequenceNode):
            below = [(str(place), part) for place, part in enumerate(node.value)]
        waiting += [((*path, name), part) for name, part in reversed(below)]
