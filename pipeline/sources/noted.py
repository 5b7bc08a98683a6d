"""The folder of fingerprints holds those of the present params file, and nothing is removed that was not written there."""

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json, write_json

LIST = "names.json"
_NAMED = re.compile(r"(environments|methods)/[a-z][a-z0-9_]*")


def drop_earlier(folder: Path, names: Iterable[str]) -> None:
    """Remove fingerprints of environments and methods that are no more, by the list of what was written before.

    ``names`` are those of the files that are written now, without their ending; they are the new list.
    """
    try:
        before = read_json(folder / LIST)
    except UserError:  # there was none
        before = []
    now = sorted(names)
    for name in before if isinstance(before, list) else ():
        if isinstance(name, str) and name not in now and _NAMED.fullmatch(name):
            (folder / f"{name}.json").unlink(missing_ok=True)
    write_json(folder / LIST, now)
