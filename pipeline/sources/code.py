"""The code and the build that results are made by, and a key of all that decides the bytes of one."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pipeline.model.kernels.library import build
from pipeline.sources.closures import closure
from pipeline.sources.hashes import file_hash

LIBRARIES = ("lightning", "numpy", "tokenizers", "torch", "transformers")
"""Packages whose versions decide numbers."""
RESOLVED = ("pipeline.settings", "pipeline.workspace.yaml_files")
"""The schema of what is in a key already: resolved settings."""
ASIDE = ("pipeline.progress", "pipeline.sources", "pipeline.tracking")
"""What tells of a result and does not take part in it."""


def result_key(start: str, inputs: Mapping[str, Any]) -> str:
    """Hash of all that decides what a module of the project makes of its ``inputs``, which JSON can hold.

    That is the module with what it imports, but for ``RESOLVED`` and ``ASIDE``, and the machine's build.
    """
    made_by = {"machine": of_machine(), "code": of_code(start)}
    return hashlib.sha256(json.dumps({**inputs, **made_by}, sort_keys=True).encode()).hexdigest()[:24]


def of_machine() -> dict[str, Any]:
    """The build of the kernels and versions of libraries: what else decides floats' last digits."""
    return {"kernels": build(), "packages": {name: version(name) for name in LIBRARIES}}


def of_code(start: str) -> dict[str, str]:
    """Hashes of a module of the project and of what it imports, but for ``RESOLVED`` and ``ASIDE``."""
    left_out = (*RESOLVED, *ASIDE)
    found, _ = closure(start, lambda name: not any(f"{name}.".startswith(f"{own}.") for own in left_out))
    return {name: file_hash(path) for name, path in found.items()}
