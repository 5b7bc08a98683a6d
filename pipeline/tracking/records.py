"""A record as a line of a spool, with a checksum; what cannot be what was written is refused.

A line is JSON whose last key is the checksum of all before it. One without, of an earlier version, must have what records
of its kind have.
"""

import json
import re
import zlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Record = dict[str, Any]
_SEALED = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)
_Time = Annotated[int, Field(ge=0, le=2**53)]
"""Milliseconds since 1970."""
_Texts = dict[str, str]


class DamagedError(Exception):
    """A line is none that this project has written; ``str()`` says what is wrong with it."""


class _Kind(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Parent(_Kind):
    name: str
    identity: _Texts


class _Run(_Parent):
    kind: Literal["run"]
    experiment: str
    parent: _Parent | None
    time: _Time


class _Tags(_Kind):
    kind: Literal["tags"]
    values: _Texts


class _Params(_Kind):
    kind: Literal["params"]
    values: dict[str, str | int | float | bool | None]


class _Dataset(_Kind):
    name: str
    digest: str
    source: str
    context: str


class _Inputs(_Kind):
    kind: Literal["inputs"]
    datasets: list[_Dataset]


class _Metrics(_Kind):
    kind: Literal["metrics"]
    values: dict[str, float | bool]
    step: Annotated[int, Field(ge=0, le=2**53)]
    time: _Time


class _Text(_Kind):
    kind: Literal["text"]
    path: str
    text: str


class _File(_Kind):
    kind: Literal["file"]
    path: str
    source: str
    digest: str


class _Turn(BaseModel):
    model_config = ConfigDict(strict=True)
    shown: str
    action: str
    valid: bool
    response: str
    ended: str
    reward: float | None
    tokens: dict[str, list[Any]]


class _Episode(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str
    state: str
    success: bool
    end: str
    turns: list[_Turn]


class _Trace(_Kind):
    kind: Literal["trace"]
    episode: _Episode
    time: _Time


class _Champion(_Kind):
    kind: Literal["champion"]
    name: str
    model: str
    digest: str
    dtype: str
    tags: _Texts


class _End(_Kind):
    kind: Literal["end"]
    status: Literal["FINISHED", "KILLED", "FAILED"]
    time: _Time


_KINDS: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Union[_Run, _Tags, _Params, _Inputs, _Metrics, _Text, _File, _Trace, _Champion, _End],
        Field(discriminator="kind"),
    ]
)


def lines_of(records: Iterable[Record]) -> bytes:
    """A line for each record; halves of characters, which no store takes, are replaced."""
    return b"".join(_sealed(json.dumps(record, ensure_ascii=False).encode(errors="replace")) for record in records)


def _sealed(body: bytes) -> bytes:
    return body[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def record_of(line: bytes) -> Record:
    """The record of a line, with or without its end.

    Raises:
        DamagedError: see there.
    """
    sealed = _SEALED.fullmatch(line.rstrip(b"\n"))
    body = sealed[1] + b"}" if sealed else line
    if sealed and int(sealed[2], 16) != zlib.crc32(body):
        raise DamagedError("its checksum is another one")
    try:
        found: Any = json.loads(body)
        if not sealed:
            _KINDS.validate_python(found)
            json.dumps(found, ensure_ascii=False).encode()  # no halves of characters
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:60]
        raise DamagedError(f"no record: {where}: {first['msg'].lower()}"[:160]) from None
    except UnicodeDecodeError:
        raise DamagedError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise DamagedError("not JSON") from None
    if not isinstance(found, dict):
        raise DamagedError("no record")
    return found


def whole_but_its_end(line: bytes) -> bool:
    """Whether an unfinished line is more than what a killed process leaves of one: a whole record with something behind."""
    return re.search(rb', "crc32": "[0-9a-f]{8}"\}.', line, re.DOTALL) is not None
