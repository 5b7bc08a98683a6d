"""Addresses without what lets people in: passwords, tokens and keys are not shown, logged or kept.

An address is cut by the rules of URLs where it keeps to them. Where it does not, because a password has an unquoted ``/``,
``@``, ``?`` or ``#``, more is hidden rather than less: everything up to the last ``@``, and every query.
"""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

HIDDEN = "…"
"""Stands where something has been left out."""
VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "SWEEP_STORAGE",
)
"""Of the environment, that hold addresses."""
SECRET_NAME = re.compile(
    r".*(password|passwd|secret|token)|"
    r"(.*[_.-])?((ssl)?pass(phrase)?|pwd|credentials?|sig(nature)?|jwt|auth(orization)?|connection[_-]?string|"
    r"((api|access|account|secret|private|session|auth|client|master)[_-]?)?key)",
    re.IGNORECASE,
)
"""What a setting is called, or a parameter of an address, that lets people in."""
_LOCAL = re.compile(r"(sqlite(\+\w+)?|file)://", re.IGNORECASE)
"""Files: their paths may have an @."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AT = re.compile(r"@|%40")
_QUERY = re.compile(r"[?#;&]")
_PARAMETER = re.compile(r"[?#;&][^?#;&=]*=")
_NAMED = re.compile(
    r"((?:password|passwd|secret|token|api[_-]?key|access[_-]?key)=|\b(?:Bearer|Basic)\s+)[^\s,;)\]}]+", re.IGNORECASE
)
_LONG = 4
"""Characters from which a piece of a secret is hidden inside of words, too."""
_LONGER = 8
"""Characters from which a secret of the environment is hidden: shorter ones may be anybody's words."""


def shown(address: str) -> str:
    """An address as people may see it: without user, password and the values of its query.

    ``postgresql://me:secret@host/runs?sslmode=require`` is ``postgresql://…@host/runs?…``.
    """
    scheme, place, query = _cut(address)
    if _AT.search(query):  # where the query begins is not certain
        return scheme + HIDDEN
    if _AT.search(place) and not _LOCAL.fullmatch(scheme):
        place = f"{HIDDEN}@{_AT.split(place)[-1]}"
    return scheme + place + (query[:1] + HIDDEN if len(query) > 1 else query)


def has_secret(text: str) -> bool:
    """Whether a text is or has an address that lets people in.

    Such one has a password, or a user of HTTP alone, or a query that names a token or a key.
    """
    within = [word[found.start() :] for word in text.split() for found in _SCHEME.finditer(word)]
    return any(any(_secrets(address)) for address in (text, *within))


def redacted(text: str, *addresses: str) -> str:
    """Somebody's words without what lets people in.

    Hidden are users and queries in whatever looks like an address, and wherever they stand the passwords of ``addresses``
    and those that the environment holds, whole or in pieces, quoted or not.
    """
    known = [*addresses, *(os.environ.get(name, "") for name in VARIABLES)]
    for address in sorted(filter(None, known), key=len, reverse=True):
        text = text.replace(address, shown(address))
    pieces = {piece for address in known for secret in _secrets(address) for piece in _pieces(secret)}
    pieces |= {value for name, value in os.environ.items() if SECRET_NAME.fullmatch(name) and len(value) >= _LONGER}
    for piece in sorted(pieces, key=len, reverse=True):
        found = re.escape(piece)
        text = re.sub(found if len(piece) >= _LONG else rf"(?<!\w){found}(?!\w)", HIDDEN, text)
    return _NAMED.sub(rf"\1{HIDDEN}", re.sub(r"\S+", lambda word: _like_an_address(word[0]), text))


def _like_an_address(word: str) -> str:
    scheme = _SCHEME.search(word)
    if scheme:
        return _like_an_address(word[: scheme.start()]) + shown(word[scheme.start() :])
    *before, after = _AT.split(word)
    if any(":" in part or "//" in part for part in before):
        return f"{HIDDEN}@{after}"
    query = _PARAMETER.search(word)
    return word[: query.start() + 1] + HIDDEN if query else word


def _cut(address: str) -> tuple[str, str, str]:
    """Scheme with ``://``, or nothing; user, host and path; and the query with its mark."""
    found = _SCHEME.match(address)
    scheme = found[0] if found else ""
    rest = address[len(scheme) :]
    query = _QUERY.search(rest)
    return (scheme, rest[: query.start()], rest[query.start() :]) if query else (scheme, rest, "")


def _secrets(address: str) -> Iterator[str]:
    """What of an address lets people in, as it is written there."""
    scheme, place, query = _cut(address)
    ends = [found.start() for found in _AT.finditer(place + query)]
    if ends and not _LOCAL.fullmatch(scheme):
        user = (place + query)[: ends[-1]]
        if scheme or re.fullmatch(r"[^\s/:]+:\S+", user):  # else it is prose
            # Of HTTP, what stands for a name is a token as often.
            secret = user if scheme.lower().startswith("http") else user.partition(":")[2]
            if secret.strip(HIDDEN):
                yield secret
    for found in _PARAMETER.finditer(query) if scheme else ():
        value = query[found.end() :]  # to the end: what follows may be an unquoted part of it
        if SECRET_NAME.fullmatch(unquote(found[0][1:-1])) and value.strip(HIDDEN):
            yield value


def _pieces(secret: str) -> Iterator[str]:
    """A secret whole, unquoted, and in the pieces that a library makes of an address that has it."""
    for form in {secret, unquote(secret)}:
        yield form
        yield from filter(None, re.split(r"[/@:?#&=;%'\"\\\s]+", form))
