"""Numbers that nothing may be built on: what is not finite, or not what it should be, is named and ends the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class NumericsError(RuntimeError):
    """A computation whose numbers are wrong; ``str()`` is one line that says which, and where."""


class NotFiniteError(NumericsError):
    """NaN or infinity."""


def require_finite(name: str, values: Tensor | np.ndarray | float) -> None:
    """Refuse NaN and infinity with a NotFiniteError."""
    if isinstance(values, np.ndarray | float | int):
        wrong = np.asarray(values)[~np.isfinite(values)]
    else:
        finite = values.isfinite()
        wrong = np.zeros(0) if bool(finite.all()) else values[~finite].detach().float().cpu().numpy()
    if wrong.size:
        more = f" and {wrong.size - 1} more of its numbers are not finite" if wrong.size > 1 else ""
        raise NotFiniteError(f"{name} is {wrong.flat[0]}{more}")


@contextmanager
def located(place: str) -> Iterator[None]:
    """Say where an error came up."""
    try:
        yield
    except NumericsError as error:
        raise type(error)(f"{place}: {error}") from None
