"""Compiles ``kernels.c`` with the machine's C compiler, once, and loads it; without a compiler there are no kernels."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")

_ADDRESS, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_HEADS, _ROWS = [_INT, _INT, _INT, _FLOAT], [_COUNT, _COUNT]
_SIGNATURES = {
    "causal_forward": [*[_ADDRESS] * 8, _COUNT, *_HEADS, *[_ADDRESS] * 2],
    "causal_backward": [*[_ADDRESS] * 8, _COUNT, *_HEADS, *[_ADDRESS] * 6],
    "cached_forward": [*[_ADDRESS] * 9, _COUNT, _ADDRESS, _COUNT, _COUNT, *_HEADS, _ADDRESS],
    "rms_norm_forward": [*[_ADDRESS] * 3, *_ROWS, _ADDRESS, _FLOAT],
    "rms_norm_backward": [*[_ADDRESS] * 4, *_ROWS, _ADDRESS, _ADDRESS],
    "swiglu_forward": [*[_ADDRESS] * 3, *_ROWS],
    "swiglu_backward": [*[_ADDRESS] * 5, *_ROWS],
    "score_forward": [*[_ADDRESS] * 6, *_ROWS, _FLOAT],
    "score_backward": [*[_ADDRESS] * 8, *_ROWS, _FLOAT],
    "sample_forward": [*[_ADDRESS] * 5, *_ROWS, _FLOAT],
}


def kernel(name: str) -> Any:
    """A function of ``kernels.c``.

    Raises:
        RuntimeError: there are no kernels on this machine.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("there are no kernels on this machine; ask `computes`, `attends` or `scores` first")
    return getattr(loaded, name)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if there is no C compiler, or ``ACTFOCUS_KERNELS=off`` is in the environment.

    They are kept beside the source or, where that cannot be written to, in the user's cache; never in a folder that
    others can write to, because what is found there is loaded.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("ACTFOCUS_KERNELS") == "off":
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    processor = platform.machine().encode() + _processor_flags()
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, processor, *map(str.encode, FLAGS)])).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actfocus"
    for folder in (SOURCE.parent / "__pycache__", cache):
        target = folder / f"kernels-{key[:16]}.so"
        try:
            if not target.exists():
                _compile(compiler, target)
            loaded = ctypes.CDLL(str(target))
            for name, types in _SIGNATURES.items():
                getattr(loaded, name).argtypes, getattr(loaded, name).restype = types, None
            return loaded
        except OSError:  # a folder that cannot be written to, or not executed from
            continue
        except subprocess.CalledProcessError:  # a compiler without vector extensions
            return None
    return None


def build() -> str:
    """Which kernels compute, in a word: builds agree to float tolerance only, so that it belongs to what decides results."""
    return "off" if library() is None else "native"


def _processor_flags() -> bytes:
    """What -march=native depends on: a library is not to be used on another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return platform.processor().encode()


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")  # processes may compile at once; the last one wins, all are equal
    subprocess.run([compiler, *FLAGS, "-o", partial, SOURCE, "-lm"], capture_output=True, check=True)
    partial.replace(target)
