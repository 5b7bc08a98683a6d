"""Compiles ``kernels.c`` with the machine's C compiler, once, and loads it; without a compiler there are no kernels."""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from platformdirs import user_cache_path

from pipeline.workspace.errors import UserError, line_of, warn
from pipeline.workspace.files import flush, remove
from pipeline.workspace.seals import DamagedError, require_sealed_file, seal_file

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

    They are for the widest instruction set of the machine, or for the one that ``ACTFOCUS_KERNELS`` names. A line tells if
    they do not compile: results have other last digits without them, and other keys (``build``). They are kept beside the
    source or, where that cannot be, in the user's cache; what others could have put there is not loaded.

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
    failed: dict[str, str] = {} if names else _broken_compiler()
    for name in names if choice is None else [choice]:
        try:
            functions = _load(name)
        except _NotBuiltError as error:
            failed[name] = str(error)
            continue
        _tell(failed, f"those for {name} are used")
        return Library(name, functions)
    _tell(failed, "PyTorch computes in their place")
    return None


def _tell(failed: Mapping[str, str], instead: str) -> None:
    """Say which kernels there are not, if any, and what computes."""
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        warn(f"kernels: {reasons}; {instead}, and results have keys of their own")


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


class _NotBuiltError(Exception):
    """Why there are no kernels of an instruction set."""


def _broken_compiler() -> dict[str, str]:
    """A compiler that is there, or was asked for, and does not work; a machine without any is no mistake."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    return {} if compiler is None else {compiler: "no compiler that works"}


def _load(name: str) -> ctypes.CDLL:
    """Load what has been compiled, or compile it. What the processor can run is part of the key, as machines may share a cache.

    Raises:
        _NotBuiltError: it does not compile, or cannot be loaded from anywhere.
    """
    compiler, flags = _compiler(), (*FLAGS, *INSTRUCTION_SETS[name].flags)
    assert compiler is not None
    machine = (_macros(compiler), platform.machine().encode(), _processor_flags())
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *machine, *map(str.encode, flags)])).hexdigest()
    file, command, reason = f"kernels-{name}-{key[:16]}.so", [compiler, *flags], "no folder to keep it in"
    own = user_cache_path("actfocus")
    for folder in (SOURCE.parent / "__pycache__", *([own] if own.is_absolute() else [])):  # a user may have no home
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (found := _kept(folder / file)) is not None:
                return found
            if why := _why_not_private(folder):
                reason = f"{folder} {why}"
                continue
            return _built(command, folder / file)
        except OSError as error:  # a folder that cannot be written to, or not executed from
            reason = f"{folder}: {line_of(error)}"
    with tempfile.TemporaryDirectory() as place:  # its owner's alone; what is loaded stays after it is removed
        try:
            built = _built(command, Path(place) / file)
        except OSError:
            raise _NotBuiltError(reason) from None
    warn(f"kernels: compiled for this command alone: {reason}")
    return built


def _kept(target: Path) -> ctypes.CDLL | None:
    """The library that was compiled before. One that others could have put there is not loaded, nor a damaged one: a line
    tells, and None is returned, as where there is none."""
    if not os.path.lexists(target):
        return None
    why = _why_not_private(target) or _why_not_private(target.parent)
    if why:
        warn(f"kernels: {target} is not loaded, it or its folder {why}; compiled again")
        return None
    try:
        require_sealed_file(target, target.name)
    except DamagedError as error:
        warn(f"kernels: {error}; compiled again")
        return None
    return _opened(target)


def _why_not_private(path: Path) -> str | None:
    """Why others than this user and root could have written a file or folder, or None. What is kept in it is executed."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_uid not in (0, os.getuid()):
        return f"belongs to user {status.st_uid}"
    return "can be written to by others" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _built(command: list[str], target: Path) -> ctypes.CDLL:
    """Compile the library, to be found again with a checksum.

    Raises:
        _NotBuiltError: it does not compile.
        OSError: it cannot be written or loaded there.
    """
    partial = target.with_suffix(f".{os.getpid()}")  # of processes at once the last one wins, all are equal
    try:
        subprocess.run([*command, "-o", partial, SOURCE, "-lm"], capture_output=True, check=True)
    except subprocess.CalledProcessError as error:  # a compiler without vector extensions
        said = error.stderr.decode(errors="replace").splitlines()
        mistake = next((line for line in said if "error" in line), f"exit code {error.returncode}")
        raise _NotBuiltError(f"does not compile: {shorten(mistake, 120, placeholder=' …')}") from None
    partial.chmod(0o700)
    seal_file(partial, target.name)
    flush(partial)
    remove(target)
    partial.replace(target)
    return _opened(target)


def _opened(target: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(target))
    for function, types in _SIGNATURES.items():
        getattr(loaded, function).argtypes, getattr(loaded, function).restype = types, None
    return loaded


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
