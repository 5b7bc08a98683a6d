"""The error of a person who can mend it, and lines that a terminal shows."""

import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.workspace.addresses import redacted

LONGEST = 290
"""Most characters of a line."""
MOST_MISTAKES = 20
"""Lines of mistakes that are told at once."""


class UserError(Exception):
    """A file or a setting of the user's that cannot be used; ``str()`` is one line per mistake."""


def warn(text: str) -> None:
    """Say on standard error, in one line, what was found wrong and could be mended here."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def line_of(error: Exception, *addresses: str) -> str:
    """What an exception says, on one line, without what lets people in (see ``redacted``)."""
    return " ".join(redacted(str(error), *addresses).split())


def raised(error: Exception) -> str:
    """An exception of a user's own code in a line, and where it came from, which a SyntaxError says itself."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(place.filename).name}, line {place.lineno})"
    return f"{type(error).__name__}: {line_of(error)}{where}"


def fitted(text: str, most: int = LONGEST) -> str:
    """A text as one line of at most so many characters, its middle left out; what no terminal shows is escaped."""
    if len(text) > 4 * most:  # before every character is looked at
        text = f"{text[: 2 * most]}{text[-2 * most :]}"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    rest = most // 3
    return shown if len(shown) <= most else f"{shown[: most - rest - 3]} … {shown[-rest:]}"


def shown(value: Any, most: int = 80) -> str:
    """A value as Python writes it, on one line of at most so many characters."""
    try:
        return fitted(repr(value), most)
    except (ValueError, RecursionError):  # of a number with more digits than Python writes, and of what is very deep
        return f"a very large {type(value).__name__}"


def listed(names: Iterable[Any], most: int = 160) -> str:
    """Names after one another, and how many more there are than so many characters hold."""
    told: list[str] = []
    for place, name in enumerate(every := [fitted(str(name), 60) for name in names]):
        if len(", ".join([*told, name])) > most:
            return f"{', '.join(told)} and {len(every) - place} more"
        told.append(name)
    return ", ".join(told)


def mistakes(lines: Iterable[str]) -> UserError:
    """The error that tells these mistakes, each once and on a line that fits, the first ones of very many."""
    told: dict[str, None] = {}
    for line in lines:
        if len(told) == MOST_MISTAKES:
            told["and more"] = None
            break
        told[fitted(line)] = None
    return UserError("\n".join(told))
