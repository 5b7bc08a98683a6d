"""Compare two revisions: success of every method in both, paired differences, and the settings that changed."""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.command import go_to_root, root_of, run

if TYPE_CHECKING:
    from pipeline.analysis.revisions import Revision

WORKSPACE = "workspace"


def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", default="params.yaml", help="params file (default: params.yaml)")
    parser.add_argument("--a", default="HEAD", help="git revision or DVC experiment (default: HEAD)")
    parser.add_argument("--b", default=WORKSPACE, help="another one (default: workspace, the files as they are)")
    arguments = parser.parse_args()
    from pipeline.report.revisions import revisions_text

    if Path(arguments.params).exists():  # else it may be in both revisions all the same
        go_to_root(arguments, root_of(arguments.params))
        arguments.params = os.path.relpath(arguments.params)
    a, b = read_revision("A", arguments.a, arguments.params), read_revision("B", arguments.b, arguments.params)
    target = arguments.params.removesuffix("params.yaml")
    return (
        f"{revisions_text(a, b)}\n"
        f"Next: dvc plots diff {' '.join(r for r in (arguments.a, arguments.b) if r != WORKSPACE)} --targets {target}dvc.yaml::"
    )


def read_revision(side: str, name: str, params_file: str) -> Revision:
    """Read a revision's params file, comparison and episodes: of the workspace from disk, else from git and DVC's cache.

    Raises:
        UserError: no such revision, or its params file or comparison cannot be had.
    """
    import pyarrow.parquet as pq
    from ruamel.yaml import YAML

    from pipeline.analysis.revisions import Revision
    from pipeline.workspace.errors import UserError

    files = Files(side, name)
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(files.read(Path(params_file)))
    out = Path(params.get("out", "."))
    comparison = json.loads(files.read(out / "reports" / "comparison.json"))
    episodes = {}
    for environment, method in {(row["environment"], row["method"]) for row in comparison["rows"]}:
        try:
            content = files.read(out / "data" / "evaluations" / f"{environment}-{method}.parquet")
        except UserError:
            continue  # without them the two revisions are not paired, and the table says so
        episodes[environment, method] = pq.read_table(io.BytesIO(content))
    return Revision(files.name, params, comparison, episodes)


class Files:
    """The files of one revision.

    Args:
        side: what errors call it, A or B.
        name: a git revision or DVC experiment, or ``workspace``.

    Raises:
        UserError: there is no such revision, or this is no git repository.
    """

    def __init__(self, side: str, name: str) -> None:
        import dvc.api
        from dvc.scm import RevError, SCMError

        from pipeline.workspace.errors import UserError

        self._where, self._fs = f"{side}={name}", None
        try:
            if name != WORKSPACE:
                self._fs = dvc.api.DVCFileSystem(rev=name)
        except (RevError, SCMError) as error:
            raise UserError(
                f"{self._where}: {str(error).splitlines()[0]}; allowed: a commit, tag, branch or DVC experiment, or workspace"
            ) from None

    @property
    def name(self) -> str:
        """As the user wrote it, with the commit that it means."""
        written = self._where.partition("=")[2]
        return written if self._fs is None else f"{written} ({self._fs.repo.get_rev()[:7]})"

    def read(self, path: Path) -> bytes:
        """A file's content.

        Raises:
            UserError: the revision does not have it, or DVC's cache does not.
        """
        from dvc.exceptions import DvcException

        from pipeline.workspace.errors import UserError

        try:
            if self._fs is None:
                return path.read_bytes()
            with self._fs.open(path.as_posix(), "rb") as stream:
                content: bytes = stream.read()
                return content
        except FileNotFoundError:
            raise UserError(f"{self._where}: {path}: {self._why_not(path)}") from None
        except DvcException as error:
            raise UserError(f"{self._where}: {str(error).splitlines()[0]}") from None

    def _why_not(self, path: Path) -> str:
        if self._fs is None:
            return "no such file; `dvc repro` makes it"
        try:
            known = self._fs.info(path.as_posix())
        except FileNotFoundError:
            return "this revision has no such file"
        if known.get("md5") is None:
            return "not in this revision's dvc.lock; commit dvc.lock after `dvc repro`, or use `dvc exp run`"
        return "not in DVC's cache; `dvc pull` it, or check the revision out and `dvc repro`"


if __name__ == "__main__":
    run(main)
