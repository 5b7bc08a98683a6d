"""What every stage's command line shares: its arguments, the folder it works in, and one-line errors with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil

from pipeline.progress.display import Display
from pipeline.settings.params import Config, load
from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.finite import NumericsError
from pipeline.workspace.layout import Cache, Layout
from pipeline.workspace.processes import end_with_parent
from pipeline.workspace.yaml_files import read_yaml

_elsewhere = False
"""Whether the stage was called from another folder than it works in."""


def parse_arguments(description: str | None, *names: str) -> argparse.Namespace:
    """``--params`` and one required option per name."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--params", default="params.yaml", help="params file (default: params.yaml)")
    for name in names:
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args()


def configured(arguments: argparse.Namespace) -> Config:
    """The checked params file, with the named environment and method known to it; works in its root from then on.

    Raises:
        UserError: the file is wrong, or does not have that environment or method.
    """
    config = load(arguments.params)
    for name, section, extra in (("environment", "environments", ()), ("method", "methods", ("reference",))):
        value = getattr(arguments, name, None)
        allowed = [*getattr(config, section), *extra]
        if value is not None and value not in allowed:
            raise UserError(f"{arguments.params}: {section}: {value!r} is not there; allowed: {', '.join(allowed)}")
    go_to_root(arguments, config.root)
    return config


def root_of(params: str) -> str:
    """What a params file says of the root, for stages that can do without the rest of it.

    Raises:
        UserError: it is missing or not YAML.
    """
    raw = read_yaml(params)
    return str(raw.get("root", ".")) if isinstance(raw, dict) else "."


def go_to_root(arguments: argparse.Namespace, root: str) -> None:
    """Make the project's root the folder that this process works in: all relative paths are meant from there.

    The user's modules are found there, too. ``arguments.params`` still names the params file.

    Args:
        arguments: of the command.
        root: path from the params file's folder to the root.

    Raises:
        UserError: there is no such folder.
    """
    folder = (Path(arguments.params).parent / root).resolve()
    if not folder.is_dir():
        raise UserError(f"{arguments.params}: root: {root!r} is not a folder, from this file's folder")
    global _elsewhere
    _elsewhere = folder != Path.cwd()
    if _elsewhere:
        arguments.params = os.path.abspath(arguments.params)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
    if "HOME" not in os.environ and os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(folder / Cache().home)


def layout_of(config: Config) -> Layout:
    """The paths of a params file's run, as seen from where the stage was called or as full paths."""
    return Layout(Path.cwd() / config.out if _elsewhere else Path(config.out))


def next_command(arguments: argparse.Namespace, stage: str, **options: str) -> str:
    """``Next: `` and the command that goes on from here, with this run's params file and the stage's options."""
    named = {"params": arguments.params} if arguments.params != "params.yaml" else {}
    return " ".join(
        [f"Next: python -m stages.{stage}", *(f"--{name} {value}" for name, value in {**named, **options}.items())]
    )


class Stopped(KeyboardInterrupt):
    """The stage was asked to end by a signal."""


def run(main: Callable[[], str]) -> None:
    """Run a stage; print its one line of result, or its error, one line per mistake, and exit with 2.

    Elsewhere than on a terminal standard error tells how far it is. Stopped by Ctrl-C or SIGTERM, it says so in one line.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name_the_user()
    before = signal.signal(signal.SIGTERM, _stop)
    if "DVC_STAGE" in os.environ:  # a killed `dvc repro` leaves nothing behind that writes beside the next one
        end_with_parent(signal.SIGTERM)
    try:
        with Display(_title(), [""], bars=False, age=_age()) as display:
            display.report("")(0, 0, "starting")
            result = main()
        print(result)
    except (UserError, TrajectoryError, NumericsError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenProcessPool:
        print("a worker process was killed (out of memory?); run the same command again to go on", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as stopped:
        word, code = ("stopped", 143) if isinstance(stopped, Stopped) else ("interrupted", 130)
        print(f"{word}; run the same command again to go on", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def name_the_user() -> None:
    """Call a user without a name by the number: containers run under ids that their passwd file does not have.

    Libraries ask for the name, too, mostly to make a folder's or a record's name of it, and fail without one.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = str(os.getuid())


def _stop(*_: Any) -> None:
    raise Stopped


def _age() -> float:
    """Seconds that this process has spent on getting here; 0 if it has done something else before."""
    with contextlib.suppress(psutil.Error, OSError):
        age: float = time.time() - psutil.Process().create_time()
        return age if 0 < age < 3 else 0.0
    return 0.0


def _title() -> str:
    """The stage, and what it was asked for."""
    options = sys.argv[1:]
    named = [value for option, value in itertools.pairwise(options) if option in NAMES]
    return " ".join([Path(sys.argv[0]).stem, "-".join(named)]).rstrip()


NAMES = ("--environment", "--method", "--study", "--name")
"""Options whose values tell one run of a stage from another."""
