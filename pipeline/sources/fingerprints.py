"""What decides results without standing in params.yaml: code and data files that it only names, as hashes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.model.origin import PACKAGE, local_folder
from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config, Environment
from pipeline.settings.policy import PretrainedPolicy, ScratchPolicy
from pipeline.sources.closures import OWN, closure, installed
from pipeline.sources.hashes import file_hash, tree_hashes

CACHE = "cache"
"""A setting of this name is a folder that an environment fills itself; it decides nothing."""


def of_environment(section: Environment) -> dict[str, Any]:
    """What an environment of params.yaml names: its module, files in its settings, versions of installed packages.

    The module is read with all that it imports outside of installed packages. What cannot be found is left out: making
    the environment says so. A file that cannot be read is a UserError, here as below.
    """
    return _of_module(section.id.rpartition(":")[0] or _registered(section.id), section.settings)


def of_method(method: BaseModel) -> dict[str, Any]:
    """What a method of params.yaml names: its functions of one's own (``kind: custom``), as an environment's module."""
    found: dict[str, Any] = {"files": {}, "packages": {}}
    for choice in custom_sections(method).values():
        named = _of_module(choice.function.partition(":")[0], choice.settings)
        found = {part: {**found[part], **named[part]} for part in found}
    return found


def of_row(config: Config, name: str) -> dict[str, Any]:
    """What a row of ``methods`` names: as ``of_method``, and the method that it is matched to, with its settings.

    DVC cannot follow a name in a params file to another section of it.
    """
    method = config.methods[name]
    found = of_method(method)
    if method.matched_to is None:
        return found
    other = config.methods[method.matched_to]
    settings = other.model_dump(mode="json", exclude={"source", "status"})
    return {**found, "matched_to": {"settings": settings, **of_method(other)}}


def _of_module(module: str, settings: Any) -> dict[str, Any]:
    def follow(name: str) -> bool:
        """Not into the project's own code, but where it adapts other packages: what it reads is listed in dvc.yaml."""
        adapters = name.startswith("pipeline.environments.") and name != "pipeline.environments.making"
        return adapters or name.partition(".")[0] not in OWN

    code, packages = closure(module, follow)
    files = {name: file_hash(path) for name, path in code.items() if name.partition(".")[0] not in OWN}
    for named, path in _paths(settings):
        files |= {f"{named}/{name}".rstrip("/."): digest for name, digest in tree_hashes(path).items()}
    return {"files": files, "packages": packages}


def of_policy(policy: ScratchPolicy | PretrainedPolicy) -> dict[str, Any]:
    """What a policy of params.yaml names: the files of a local model directory or of a package that carries one, by name,
    and the package's version."""
    if policy.kind == "scratch" or (folder := local_folder(policy.model)) is None:
        return {"files": {}}
    package = policy.model.removeprefix(PACKAGE)
    if package == policy.model:
        return {"files": tree_hashes(folder)}
    return {"files": tree_hashes(folder), "packages": {package: installed(str(folder), package)}}


def _registered(name: str) -> str:
    """The module of an id that names none: of ours, or of a package that tells gymnasium its ids. Empty if unknown."""
    import gymnasium

    import pipeline.environments.making  # noqa: F401  (registers ours)

    spec = gymnasium.registry.get(name)
    entry_point = None if spec is None else spec.entry_point
    if isinstance(entry_point, str):
        return entry_point.partition(":")[0]
    return getattr(entry_point, "__module__", "")


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
