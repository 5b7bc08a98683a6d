"""Compiles ``kernels.c`` with the machine's C compiler, once, and loads it; without a compiler there are no kernels."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path

from pipeline.workspace.errors import UserError

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-fPIC", "-shared", "-Wno-psabi")
CHOICE = "ACTFOCUS_KERNELS"
"""Environment variable: ``off``, or the instruction set to compile for instead of the widest that there is."""


class InstructionSet(NamedTuple):
    """What the compiler is to be told, and which of its macros say that the machine has it."""

    flags: tuple[str, ...]
    macros: frozenset[bytes]


INSTRUCTION_SETS = {
    "avx512": InstructionSet(("-march=native",), frozenset({b"__AVX512F__"})),
    "avx2": InstructionSet(("-march=native", "-mno-avx512f"), frozenset({b"__AVX2__", b"__FMA__"})),
    "neon": InstructionSet((), frozenset({b"__aarch64__"})),
    "baseline": InstructionSet((), frozenset()),
}
"""The widest first. ``baseline`` is what the compiler assumes of any processor: SSE2 on x86-64."""

_ADDRESS, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_HEADS, _ROWS = [_INT, _INT, _INT, _FLOAT], [_COUNT, _COUNT]
_SIGNATURES = {
    "causal_forward": [*[_ADDRESS] * 8, _COUNT, *_HEADS, *[_ADDRESS] * 2],
    "causal_backward": [*[_ADDRESS] * 8, _COUNT, *_HEADS, *[_ADDRESS] * 6],
    "cached_forward": [*[_ADDRESS] * 7, *[_COUNT] * 2, *[_ADDRESS] * 2, _COUNT, _ADDRESS, _COUNT, *_HEADS, _ADDRESS],
    "rms_norm_forward": [*[_ADDRESS] * 3, *_ROWS, _ADDRESS, _FLOAT],
    "rms_norm_backward": [*[_ADDRESS] * 4, *_ROWS, _ADDRESS, _ADDRESS],
    "swiglu_forward": [*[_ADDRESS] * 3, *_ROWS],
    "swiglu_backward": [*[_ADDRESS] * 5, *_ROWS],
    "score_forward": [*[_ADDRESS] * 6, *_ROWS, _FLOAT],
    "score_backward": [*[_ADDRESS] * 8, *_ROWS, _FLOAT],
    "sample_forward": [*[_ADDRESS] * 5, *_ROWS, _FLOAT],
}


class Library(NamedTuple):
    """Compiled kernels."""

    instruction_set: str
    """A key of ``INSTRUCTION_SETS``."""
    functions: ctypes.CDLL


def kernel(name: str) -> Any:
    """A function of ``kernels.c``.

    Raises:
        RuntimeError: there are no kernels on this machine.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("there are no kernels on this machine; ask `computes`, `attends` or `scores` first")
    return getattr(loaded.functions, name)


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The compiled kernels; None if there is no C compiler, or ``ACTFOCUS_KERNELS=off`` is in the environment.

    They are for the widest instruction set of the machine, or for the one that ``ACTFOCUS_KERNELS`` names. They are
    kept beside the source or, where that cannot be written to, in the user's cache; never in a folder that others can
    write to, because what is found there is loaded.

    Raises:
        UserError: ``ACTFOCUS_KERNELS`` names what is no instruction set, or none of this machine.
    """
    choice = os.environ.get(CHOICE) or None
    if choice == "off":
        return None
    names = usable()
    if choice is not None and choice not in names:
        allowed = ", ".join(["off", *names])
        raise UserError(f"{CHOICE}: {choice!r} is not an instruction set of this machine; allowed: {allowed}")
    for name in names if choice is None else [choice]:
        functions = _load(name)
        if functions is not None:
            return Library(name, functions)
    return None


def usable() -> list[str]:
    """Instruction sets that this machine and its compiler have, the widest first; none without a compiler."""
    macros = _macros(_compiler())
    defined = {line.split()[1] for line in macros.splitlines() if line.startswith(b"#define ")}
    return [name for name, needed in INSTRUCTION_SETS.items() if macros and needed.macros <= defined]


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def _macros(compiler: str | None) -> bytes:
    """What the compiler defines for this processor, its own version included; empty if it does not work."""
    if compiler is None:
        return b""
    for native in (["-march=native"], []):  # not every compiler knows it for every processor
        command = [compiler, *native, "-dM", "-E", "-x", "c", os.devnull]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            return done.stdout
    return b""


def _load(name: str) -> ctypes.CDLL | None:
    """Compile what is not there yet. What the processor can run is part of the key, as machines may share a cache."""
    compiler, flags = _compiler(), (*FLAGS, *INSTRUCTION_SETS[name].flags)
    assert compiler is not None
    machine = (_macros(compiler), platform.machine().encode(), _processor_flags())
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *machine, *map(str.encode, flags)])).hexdigest()
    folders = [SOURCE.parent / "__pycache__", user_cache_path("actfocus")]
    for folder in filter(Path.is_absolute, folders):  # a user may have no home
        target = folder / f"kernels-{name}-{key[:16]}.so"
        try:
            if not target.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                partial = target.with_suffix(f".{os.getpid()}")  # of processes at once the last one wins, all are equal
                subprocess.run([compiler, *flags, "-o", partial, SOURCE, "-lm"], capture_output=True, check=True)
                partial.replace(target)
            loaded = ctypes.CDLL(str(target))
            for function, types in _SIGNATURES.items():
                getattr(loaded, function).argtypes, getattr(loaded, function).restype = types, None
            return loaded
        except OSError:  # a folder that cannot be written to, or not executed from
            continue
        except subprocess.CalledProcessError:  # a compiler without vector extensions
            return None
    return None


def build() -> str:
    """Which kernels compute, in a word: builds agree to float tolerance only, so that it belongs to what decides results."""
    loaded = library()
    return "off" if loaded is None else loaded.instruction_set


def _processor_flags() -> bytes:
    """What the kernel says that the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return platform.processor().encode()
