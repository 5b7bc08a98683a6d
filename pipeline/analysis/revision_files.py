"""What a git revision, a DVC experiment or the workspace holds of a comparison."""

import json
from pathlib import Path
from typing import Any

import dvc.api
from dvc.exceptions import DvcException
from dvc.scm import RevError, SCMError

from pipeline.analysis.revisions import Revision
from pipeline.trajectories.results import results_of
from pipeline.workspace.errors import UserError, line_of
from pipeline.workspace.files import never_sealed
from pipeline.workspace.layout import Layout
from pipeline.workspace.seals import require_sealed
from pipeline.workspace.yaml_files import parse_yaml

WORKSPACE = "workspace"
"""The files as they are."""


def read_revision(side: str, name: str, params_file: str) -> Revision:
    """Read a revision's params file, comparison and episodes: of the workspace from disk, else from git and DVC's cache.

    Raises:
        UserError: no such revision, or its params file or comparison cannot be had, or a file is damaged.
    """
    files = Files(side, name)
    params: Any = parse_yaml(files.read(Path(params_file)), f"{side}={name}: {params_file}")
    if not isinstance(params, dict) or not isinstance(params.get("out", "."), str):
        raise UserError(f"{side}={name}: {params_file}: not a params file")
    layout = Layout(Path(params.get("out", ".")))
    comparison = _comparison(files, layout.comparison)
    episodes = {}
    for environment, method in {(row["environment"], row["method"]) for row in comparison["rows"]}:
        try:
            content = files.read(layout.evaluations(environment, method))
        except UserError:
            continue  # without them the two revisions are not paired, and the table says so
        place = layout.evaluations(environment, method)
        if not never_sealed(content):
            require_sealed(content, place)
        episodes[environment, method] = results_of(content, f"{side}={name}: {place}")
    return Revision(files.name, params, comparison, episodes)


def _comparison(files: "Files", path: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{files.name}: {path}: cannot be read: {line_of(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{files.name}: {path}: not a comparison")
    return found


class Files:
    """The files of one revision.

    Args:
        side: what errors call it, A or B.
        name: a git revision or DVC experiment, or ``workspace``.

    Raises:
        UserError: there is no such revision, or this is no git repository.
    """

    def __init__(self, side: str, name: str) -> None:
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
        try:
            if self._fs is None:
                return path.read_bytes()
            return bytes(self._fs.read_bytes(path.as_posix()))
        except FileNotFoundError:
            raise UserError(f"{self._where}: {path}: {self._why_not(path)}") from None
        except OSError as error:
            raise UserError(f"{self._where}: {path}: cannot be read: {error.strerror}") from None
        except DvcException as error:
            raise UserError(f"{self._where}: {str(error).splitlines()[0]}") from None

    def _why_not(self, path: Path) -> str:
        if self._fs is None:
            return "no such file; `dvc repro` makes it"
        try:
            known = self._fs.info(path.as_posix())
        except FileNotFoundError:
            made = "; a preset's params.yaml, dvc.yaml and dvc.lock are made, and here they are not committed"
            return f"this revision has no such file{made if path.parts[0] == 'presets' else ''}"
        if known.get("md5") is None:
            return "not in this revision's dvc.lock; commit dvc.lock after `dvc repro`, or use `dvc exp run`"
        return "not in DVC's cache; `dvc pull` it, or check the revision out and `dvc repro`"
