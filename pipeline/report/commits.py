"""Which commit the tables of a document are from: what their runs have noted, else when the document last changed there."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pipeline.tracking.noted import noted_runs

MADE = re.compile(r"\n\nMade by (?:commits? |an unknown commit).*\.$")
"""The line at the end of a block that says so, and the empty one before it."""
UNKNOWN = "unknown"
"""Of a run that has noted no commit, or was not made in a git repository."""


def noted_revisions(runs: Path) -> list[str]:
    """The commits that the trainings of a folder ``data/runs`` have noted, each once; ``+changes`` after uncommitted edits.

    Empty if there are no such trainings, or one has noted nothing (it was made before this was noted).
    """
    entries = [entry for file in sorted(runs.glob("*.json")) for entry in noted_runs(file).values()]
    found = [str(entry.get("revision", UNKNOWN)) for entry in entries]
    return [] if UNKNOWN in found else list(dict.fromkeys(found))


def made_by(revisions: Iterable[str], root: Path) -> str:
    """One line: ``Made by commit 1234567 (2026-11-20).``; of several, all in order of their dates.

    Revisions are as ``noted_revisions`` gives them. A commit that the repository at ``root`` does not have has no date.
    """
    dated = sorted((_git(root, "show", "-s", "--format=%cs", r.removesuffix("+changes")), r) for r in revisions)
    words = []
    for date, revision in dated:
        name, changes = revision.removesuffix("+changes")[:7], revision.endswith("+changes")
        words.append(f"{name}{' and uncommitted changes' * changes}{f' ({date})' if date else ''}")
    if not words:
        return "Made by an unknown commit."
    return f"Made by commit{'s' * (len(words) > 1)} {', '.join(words)}."


def last_changed(document: Path, first: int, last: int) -> str:
    """One line: ``Made by commit 1234567 (2026-11-20), in which this table last changed.``

    The table has the lines ``first`` to ``last``, from 1; lines that are not committed do not count. Without a git
    repository the commit is unknown.
    """
    where = ("-L", f"{first},{last}", "--line-porcelain", "--", document.name)
    found: dict[str, int] = {}
    commit = ""
    for line in _git(document.parent, "blame", *where).splitlines():
        if re.match(r"[0-9a-f]{40} ", line):
            commit = line[:40]
        elif line.startswith("committer-time ") and commit.strip("0"):
            found[commit] = int(line.split()[1])
    if not found:
        return made_by([], document.parent)
    made = made_by([max(found, key=found.__getitem__)], document.parent)
    return f"{made.removesuffix('.')}, in which this table last changed."


def committed(file: Path) -> str:
    """Date of the commit in which a file got what it holds now; empty if it is in none, or has been edited since."""
    if _git(file.parent, "status", "--porcelain", "--", file.name):
        return ""
    return _git(file.parent, "log", "-1", "--format=%cs", "--", file.name)


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
