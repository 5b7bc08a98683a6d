"""Where the files of a policy are that params.yaml names: on the hub, in a directory, or in an installed package."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pipeline.workspace.errors import UserError

PACKAGE = "package:"
"""Before the name of an installed package that carries weights."""


class LoadedFrom(NamedTuple):
    """What transformers loads a policy from."""

    source: str | Path
    """A directory, or an id of the hub."""
    gguf_file: str | None
    """The file in it that holds everything, if it is a GGUF file."""


def origin(model: str | Path, gguf_file: str | None = None) -> LoadedFrom:
    """Where ``policy.model`` and ``policy.gguf_file`` lead.

    Without ``gguf_file`` the only GGUF file of a directory without a ``config.json`` is taken.

    Raises:
        UserError: the directory, package or file is not there, or there are several GGUF files to choose from.
    """
    folder = local_folder(model)
    if folder is None:
        return LoadedFrom(str(model), gguf_file)
    there = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise UserError(f"policy.gguf_file: {gguf_file!r} is not in {model}; there: {', '.join(there) or 'none'}")
        return LoadedFrom(folder, gguf_file)
    if (folder / "config.json").is_file() or (not there and not str(model).startswith(PACKAGE)):
        return LoadedFrom(folder, None)
    if not there:
        raise UserError(f"policy.model: {model}: the package holds no .gguf file, nor a config.json")
    if len(there) > 1:
        raise UserError(
            f"policy.model: {model} holds several .gguf files; gguf_file must say which: {', '.join(there)}"
        )
    return LoadedFrom(folder, there[0])


def local_folder(model: str | Path) -> Path | None:
    """The directory that ``policy.model`` names on this machine; None for an id of the hub.

    Raises:
        UserError: it is not there, or no directory.
    """
    if str(model).startswith(PACKAGE):
        return _folder_of_package(str(model).removeprefix(PACKAGE))
    path = Path(model)
    if path.is_file():
        raise UserError(
            f"policy.model: {model} is a file; model is the directory {str(path.parent)!r}"
            + (f", gguf_file is {path.name}" if path.suffix == ".gguf" else "")
        )
    if path.is_dir():
        return path
    if path.is_absolute() or str(model).startswith("."):
        raise UserError(f"policy: {model}: no such model directory")
    return None


def _folder_of_package(name: str) -> Path:
    """Found without importing it: packages of weights may need at import what is not needed here."""
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise UserError(f"policy.model: {PACKAGE}{name}: no package {name!r} is installed")
    if not spec.submodule_search_locations:
        raise UserError(f"policy.model: {PACKAGE}{name}: {name} is a single module, which carries no weights")
    return Path(next(iter(spec.submodule_search_locations)))
