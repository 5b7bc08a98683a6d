"""The error of a person who can mend it."""

import sys
import traceback
from pathlib import Path


class UserError(Exception):
    """A file or a setting of the user's that cannot be used; ``str()`` is one line per mistake."""


def warn(text: str) -> None:
    """Say on standard error, in one line, what was found wrong and could be mended here."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def line_of(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())


def raised(error: Exception) -> str:
    """An exception of a user's own code in a line, and where it came from, which a SyntaxError says itself."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(place.filename).name}, line {place.lineno})"
    return f"{type(error).__name__}: {line_of(error)}{where}"
