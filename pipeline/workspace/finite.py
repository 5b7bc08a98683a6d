"""Numbers that nothing may be built on: what is not finite, or not what it should be, is named and ends the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class NumericsError(RuntimeError):
    """A computation whose numbers are wrong; ``str()`` is one line that says which, and where."""


class NotFiniteError(NumericsError):
    """NaN or infinity."""


def require_finite(name: str, values: Tensor | np.ndarray | float, place: Callable[[int], str] | None = None) -> None:
    """Refuse NaN and infinity with a NotFiniteError; ``place`` says in words where a number is, by its flat index."""
    if isinstance(values, np.ndarray | float | int):
        places = np.flatnonzero(~np.isfinite(values))
        wrong = np.asarray(values).ravel()[places]
    else:
        finite = values.isfinite()
        if bool(finite.all()):
            return
        places = (~finite).flatten().nonzero().flatten().cpu().numpy()
        wrong = values[~finite].detach().float().cpu().numpy()
    if wrong.size:
        where = f" at {place(int(places[0]))}" if place is not None else ""
        more = f" and {wrong.size - 1} more of its numbers are not finite" if wrong.size > 1 else ""
        raise NotFiniteError(f"{name} is {wrong[0]}{where}{more}")


@contextmanager
def located(place: str) -> Iterator[None]:
    """Say where an error came up."""
    try:
        yield
    except NumericsError as error:
        raise type(error)(f"{place}: {error}") from None
