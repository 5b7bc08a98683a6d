"""What the adapters of other libraries' environments share: free text as an action, and a place to run in."""

import difflib
import io
import random
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout

import numpy as np

_NOT_AN_ANSWER = re.compile(r"\|\||</?(?:think|answer)>|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What separates actions, the tags of a response, and characters that are no text; tab and line feed are."""


def free_text(text: str, longest: int) -> str | None:
    """Any text without the space around it; None if nothing is left, more than ``longest`` characters, or no answer."""
    text = text.strip()
    return text if 0 < len(text) <= longest and not _NOT_AN_ANSWER.search(text) else None


def check_known(kind: str, name: str, package: str, known: Collection[str]) -> None:
    """Refuse, with a ValueError, a name that a package does not have, with the closest one that it has."""
    if name not in known:
        close = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(name, known, n=1))
        raise ValueError(f"{kind} must be one of {package}'s, got {name!r}{close}")


class Enclosure:
    """Where foreign code runs: its draws from Python's and NumPy's global generators are its own, its prints are lost.

    The draws begin at ``seed``, at least 0.
    """

    def __init__(self, seed: int) -> None:
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the global generators go on from where they were left in here; outside, they are as they were."""
        outside = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            with redirect_stdout(io.StringIO()):
                yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(outside[0])
            np.random.set_state(outside[1])
