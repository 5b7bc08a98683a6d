"""A module with all that it imports. Nothing is imported to find out: imports are read from text, in a fraction of a second."""

import ast
import importlib
import importlib.util
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import accumulate
from pathlib import Path

from pipeline.sources.hashes import Stamp, stamp_of

OWN = ("pipeline", "stages")
"""The project's packages: read, wherever they are installed."""

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FILE_NAME = re.compile(r"[^\x00-\x1f/\\]{1,100}\.\w{1,12}")


def closure(start: str, follow: Callable[[str], bool]) -> tuple[dict[str, Path], dict[str, str]]:
    """A module with all that it imports, at whatever depth and wherever in the file.

    Beside import statements, ``import_module("name")`` and entry points (``"module:Name"``) count, and a file that stands
    beside a module and is named in it. Imports for type checkers alone do not, nor the standard library, nor a module whose
    name ``follow`` is false for.

    Returns:
        Files by name of module, or ``module/file``; and versions of installed packages by name.
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
        if top not in OWN and (found := installed(spec.origin, top)) is not None:
            packages[top] = found
            continue
        files[name] = Path(spec.origin)
        imported, beside = _read(files[name], name, spec.submodule_search_locations is not None, stamp_of(files[name]))
        files |= {f"{name}/{file.name}": file for file in beside}
        following = [found for found in (*_levels(name), *imported) if found not in seen]
        seen.update(following)
        todo.extend(dict.fromkeys(following))
    return dict(sorted(files.items())), dict(sorted(packages.items()))


def _found(name: str) -> ModuleSpec | None:
    """Where a module is. Only the finders of its topmost package are asked: to import its parents could take seconds."""
    top, *below = _levels(name)
    try:
        spec = importlib.util.find_spec(top)
        for full in below:
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(full, spec.submodule_search_locations)
    except (AttributeError, ImportError, ValueError):
        return None
    return spec if spec is not None and spec.has_location else None


def installed(origin: str, top: str) -> str | None:
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
def _read(file: Path, name: str, package: bool, stamp: Stamp) -> tuple[tuple[str, ...], tuple[Path, ...]]:
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


def _levels(name: str) -> Iterator[str]:
    """A module with the packages that are imported with it, the topmost first."""
    return accumulate(name.split("."), "{}.{}".format)
