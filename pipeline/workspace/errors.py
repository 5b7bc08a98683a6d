"""The error of a person who can mend it."""

from __future__ import annotations


class UserError(Exception):
    """A file or a setting of the user's that cannot be used; ``str()`` is one line per mistake."""
