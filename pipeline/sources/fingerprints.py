"""What decides results without standing in params.yaml: code, data files and builds that it only names, as hashes.

Nothing is imported to find out: a module's imports are read from its text, so that this takes a fraction of a second.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from pipeline.model.kernels.library import build
from pipeline.settings.params import Environment, PretrainedPolicy, ScratchPolicy
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_text
from pipeline.workspace.layout import Cache

LIBRARIES = ("lightning", "numpy", "tokenizers", "torch", "transformers")
"""Packages whose versions decide numbers."""
OWN = ("pipeline", "stages")
"""The project's packages: read, wherever they are installed."""
CACHE = "cache"
"""A setting of this name is a folder that an environment fills itself; it decides nothing."""
LARGE = 2**20
"""Bytes from which a file's hash is kept in ``KNOWN`` and used again while the file is untouched."""
KNOWN = Cache().hashes
TICK = 2 * 10**9
"""Nanoseconds within which a file may be written twice and show the same times."""

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FILE_NAME = re.compile(r"[^\x00-\x1f/\\]{1,100}\.\w{1,12}")


def of_environment(section: Environment) -> dict[str, Any]:
    """What an environment of params.yaml names: its module, files in its settings, versions of installed packages.

    The module is read with all that it imports outside of installed packages. What cannot be found is left out: making
    the environment says so.

    Raises:
        UserError: a file cannot be read.
    """
    module = section.id.rpartition(":")[0] or _registered(section.id)

    def follow(name: str) -> bool:
        """Not into the project's own code, but where it adapts other packages: what it reads is listed in dvc.yaml."""
        adapters = name.startswith("pipeline.environments.") and name != "pipeline.environments.registry"
        return adapters or name.partition(".")[0] not in OWN

    code, packages = closure(module, follow)
    files = {name: file_hash(path) for name, path in code.items() if name.partition(".")[0] not in OWN}
    for named, path in _paths(section.settings):
        files |= {f"{named}/{name}".rstrip("/."): digest for name, digest in _tree(path).items()}
    return {"files": files, "packages": packages}


def of_policy(policy: ScratchPolicy | PretrainedPolicy) -> dict[str, Any]:
    """What a policy of params.yaml names: the files of a local model directory, by name.

    Raises:
        UserError: a file cannot be read.
    """
    if policy.kind == "scratch" or not Path(policy.model).is_dir():
        return {"files": {}}
    return {"files": _tree(Path(policy.model))}


def of_machine() -> dict[str, Any]:
    """The build of the kernels and versions of libraries: what else decides floats' last digits."""
    return {"kernels": build(), "packages": {name: version(name) for name in LIBRARIES}}


def of_code(start: str, left_out: Collection[str]) -> dict[str, str]:
    """Hashes of a module of the project and of what it imports, but for modules and packages that are left out."""
    found, _ = closure(start, lambda name: not any(f"{name}.".startswith(f"{own}.") for own in left_out))
    return {name: file_hash(path) for name, path in found.items()}


def closure(start: str, follow: Callable[[str], bool]) -> tuple[dict[str, Path], dict[str, str]]:
    """A module with all that it imports, at whatever depth and wherever in the file.

    Beside import statements, ``import_module("name")`` and entry points (``"module:Name"``) count, and a file that stands
    beside a module and is named in it. Imports for type checkers alone do not.

    Args:
        start: name of a module; empty for none.
        follow: whether a module, by its name, is told and read.

    Returns:
        Files by name of module, or ``module/file``; and versions of installed packages by name. The standard library is
        left out.
    """
    importlib.invalidate_caches()
    files: dict[str, Path] = {}
    packages: dict[str, str] = {}
    todo, seen = deque([start]), {start}
    while todo:
        name = todo.popleft()
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or not follow(name):
            continue
        spec = _found(name)
        if spec is None or spec.origin is None:
            continue
        if top not in OWN and (installed := _installed(spec.origin, top)) is not None:
            packages[top] = installed
            continue
        files[name] = Path(spec.origin)
        imported, beside = _read(files[name], name, spec.submodule_search_locations is not None, _stamp(files[name]))
        files |= {f"{name}/{file.name}": file for file in beside}
        following = [found for found in (*_parents(name), *imported) if found not in seen]
        seen.update(following)
        todo.extend(dict.fromkeys(following))
    return dict(sorted(files.items())), dict(sorted(packages.items()))


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        stamp = _stamp(path)
        if stamp.size < LARGE:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        place, known = str(path.resolve()), _known()
        if known.get(place, [None])[:-1] == stamp.parts:
            return str(known[place][-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A file that has just been written could be written again within the same tick of its clock.
        if _stamp(path) == stamp and time.time_ns() - max(stamp.modified, stamp.changed) > TICK:
            write_text(KNOWN, json.dumps({**_known(), place: [*stamp.parts, digest]}, indent=1, sort_keys=True))
        return digest
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Stamp:
    """What changes when a file is written, even by who sets its time back: then its inode's has changed."""

    size: int
    modified: int
    changed: int
    inode: int

    @property
    def parts(self) -> list[int]:
        return [self.size, self.modified, self.changed, self.inode]


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _known() -> dict[str, list[Any]]:
    try:
        found = json.loads(KNOWN.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _registered(name: str) -> str:
    """The module of an id that names none: of ours, or of a package that tells gymnasium its ids. Empty if unknown."""
    import gymnasium

    import pipeline.environments.registry  # noqa: F401  (registers ours)

    spec = gymnasium.registry.get(name)
    entry_point = None if spec is None else spec.entry_point
    if isinstance(entry_point, str):
        return entry_point.partition(":")[0]
    return getattr(entry_point, "__module__", "")


def _found(name: str) -> ModuleSpec | None:
    """Where a module is. Only the finders of its topmost package are asked: to import its parents could take seconds."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for depth in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            full = ".".join([top, *rest[: depth + 1]])
            spec = PathFinder.find_spec(full, spec.submodule_search_locations)
    except (AttributeError, ImportError, ValueError):
        return None
    return spec if spec is not None and spec.has_location else None


def _installed(origin: str, top: str) -> str | None:
    """The version of an installed package; None for code that is not installed, or by hand."""
    if not {"site-packages", "dist-packages"} & set(Path(origin).parts):
        return None
    try:
        return version(top)
    except PackageNotFoundError:
        names = _distributions().get(top, [])
        return ", ".join(f"{name} {version(name)}" for name in sorted(set(names))) or None


_distributions = lru_cache(maxsize=1)(packages_distributions)


@lru_cache(maxsize=1024)
def _read(file: Path, name: str, package: bool, stamp: _Stamp) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Names of modules that a file imports, and files beside it that it names. Nothing of what is not Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return (), ()
    inside = name if package else name.rpartition(".")[0]
    names, beside = [], set()
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            names += [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _ENTRY_POINT.fullmatch(node.value):
                names.append(node.value.partition(":")[0])
            elif _FILE_NAME.fullmatch(node.value) and (file.parent / node.value).is_file():
                beside.add(file.parent / node.value)
    return tuple(dict.fromkeys(names)), tuple(sorted(beside))


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, ast.If) and _called(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse)
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))


def _called(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _parents(name: str) -> list[str]:
    """Packages that are imported with a module."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _paths(value: Any) -> Iterator[tuple[str, Path]]:
    """Every text in settings that is the path of a file or folder, with that text."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != CACHE:
                yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and value:
        try:
            path = Path(value)
            if path.is_file() or (path.is_dir() and not Path.cwd().is_relative_to(path.resolve())):
                yield value, path
        except (OSError, ValueError):  # no path at all, but a text
            return


def _tree(path: Path) -> dict[str, str]:
    """Hashes of a file or of all files of a folder, by their names in it; links count as what they lead to."""
    if path.is_file():
        return {".": file_hash(path)}
    found = {}
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            file = Path(folder, name)
            found[file.relative_to(path).as_posix()] = file_hash(file)
    return found
