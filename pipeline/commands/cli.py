"""What stages and commands share: their options, the folder they work in, and errors in one line with exit code 2."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Container
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
import typer.main

from pipeline.progress.display import Display
from pipeline.workspace.addresses import redacted
from pipeline.workspace.errors import UserError, fitted, listed, shown
from pipeline.workspace.faults import fault_line, writing
from pipeline.workspace.files import lock
from pipeline.workspace.finite import NumericsError
from pipeline.workspace.layout import Cache, Layout
from pipeline.workspace.ours import require_inside
from pipeline.workspace.processes import end_with_parent, is_orphan, start_with_parent
from pipeline.workspace.stopping import (
    PARENT_ENDED,
    Stopped,
    asked,
    say_that_it_stops,
    stop,
    stop_if_asked,
    until_saved,
)
from pipeline.workspace.yaml_files import read_yaml

if TYPE_CHECKING:
    from pipeline.settings.params import Config

ParamsFile = Annotated[str, typer.Option("--params", metavar="FILE", help="Params file.")]
EnvironmentName = Annotated[str, typer.Option("--environment", metavar="NAME", help="Environment of the params file.")]
FirstEnvironment = Annotated[str | None, typer.Option("--environment", metavar="NAME", help="Default: the first one.")]
MethodName = Annotated[
    str, typer.Option("--method", metavar="NAME", help="Method of it; also reference, to be played.")
]
StudyName = Annotated[str, typer.Option("--study", metavar="NAME", help="Study of the params file's sweep.")]
NAMES = ("--environment", "--method", "--study", "--name")
"""Options whose values tell one run of a stage from another."""
_locks: dict[Path, contextlib.ExitStack] = {}
"""What this command makes and no other does meanwhile."""


def configured(params: str, environment: str | None = None, method: str | None = None) -> tuple[Config, Layout, str]:
    """The checked params file, which knows the environment and the method; its run's paths; its own, as ``go_to_root``.

    The run's are full paths where the command was called from another folder than the root. Of seeds that are added until
    it is decided, the configuration has those in effect.

    Raises:
        UserError: the file is wrong, or does not have that environment or method, or something leads out of the root.
    """
    from pipeline.settings.params import load  # takes half a second, and helps nobody who asks for --help
    from pipeline.sources.seeds_in_effect import with_seeds_in_effect

    config, here = load(params), Path.cwd()
    for section, name, extra in (("environments", environment, ()), ("methods", method, ("reference",))):
        allowed = [*getattr(config, section), *extra]
        if name is not None and name not in allowed:
            raise UserError(f"{params}: {section}: {shown(name)} is not there; allowed: {listed(allowed)}")
    params = go_to_root(params, config.root)
    layout = Layout(Path(config.out) if Path.cwd() == here else Path.cwd() / config.out)
    if not config.overwrite_outside_root:
        engine = config.rollout.engine
        weights = [Path(engine.weights)] if engine.kind == "vllm" else []
        places = [Path(params).parent, layout.out, *weights]
        require_inside(Path.cwd(), places, [*layout.folders, Cache().folder], params)
    return with_seeds_in_effect(config, layout.seeds_in_effect), layout, params


def go_to_root(params: str, root: str | None = None) -> str:
    """Work in the project's root: all relative paths are meant from there, and the user's modules are found there.

    ``root`` is the path to it from the params file's folder; None is what the file says, whatever else is wrong in it.
    Returns a path of the params file that is right from there.

    Raises:
        UserError: there is no such folder, or without ``root`` no such file.
    """
    if root is None:
        raw = read_yaml(params)
        root = str(raw.get("root", ".")) if isinstance(raw, dict) else "."
    folder = Path(os.path.realpath(Path(params).parent / root))
    if not os.path.isdir(folder):
        raise UserError(f"{params}: root: {root!r} is not a folder, from this file's folder")
    if folder != Path.cwd():
        params = os.path.abspath(params)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
    if "HOME" not in os.environ and os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(folder / Cache().home)
    return params


def make_alone(layout: Layout, makes: str, shared: Path | None = None) -> None:
    """From here on and until this command ends, no other one makes the same of the run; this one waits for it, and says so.

    Nor does another one, of whatever run, work in what is ``shared`` of the cache. To be called where a mistake of the user's
    would have been found: a command that refuses leaves no file.
    """
    _lock(Cache().lock(f"{os.path.relpath(layout.out)}/{makes}"), makes)
    if shared is not None:
        _lock(shared.with_name(f"{shared.name}.lock"), makes)


def _lock(path: Path, makes: str) -> None:
    if path in _locks:
        return

    def waiting() -> None:
        who = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            who = f" ({path.read_text(encoding='utf-8')})"
        said = f"{makes}: another command makes the same{who}; this one waits for its end"
        print(said, file=sys.stderr, flush=True)

    held = _locks[path] = contextlib.ExitStack()
    held.enter_context(lock(path, waiting=waiting))
    with contextlib.suppress(OSError):
        told = " ".join([_program(), *map(shlex.quote, sys.argv[1:])])
        path.write_text(f"process {os.getpid()}: {told}", encoding="utf-8")


def reproduce(pipeline: Path) -> None:
    """``dvc repro`` of a dvc.yaml, with what it prints; if it fails, this process ends with its exit code.

    Asked to stop, it waits for the stage that is at work, which ends at its next save.
    """
    from pipeline.progress.display import still

    with until_saved(), still():  # the stages speak for themselves
        dvc = subprocess.Popen(["dvc", "repro", str(pipeline)], preexec_fn=start_with_parent(signal.SIGKILL))
        told = {dvc.pid}
        try:
            while (code := _ended(dvc)) is None:
                if asked():
                    if len(told) == 1:
                        say_that_it_stops("unit of work that is next to be saved")
                    told |= _tell_stage(dvc, PARENT_ENDED, told)  # the next one, too, where DVC was between two
        except Stopped:
            _tell_stage(dvc, signal.SIGKILL)
            raise
        finally:
            dvc.kill()
            dvc.wait()
        stop_if_asked()
    if code:
        sys.exit(code)


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process, or None if it has not ended within a moment."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(0.2)
    return None


def _tell_stage(dvc: subprocess.Popen[bytes], number: int, told: Container[int] = ()) -> set[int]:
    """Send a signal to what DVC runs now, but for those who were told; returns their process ids."""
    found = set[int]()
    with contextlib.suppress(psutil.Error):
        for stage in psutil.Process(dvc.pid).children():
            if stage.pid not in told:
                stage.send_signal(number)
            found.add(stage.pid)
    return found


def next_command(params: str, command: str, **options: str) -> str:
    """``Next: `` and the command that goes on from here, with this run's params file and the command's options."""
    named = {**({"params": params} if params != "params.yaml" else {}), **options}
    return " ".join([f"Next: {command}", *(f"--{name} {shlex.quote(value)}" for name, value in named.items())])


def run(*mains: Callable[..., str]) -> None:
    """Run a stage, or one of several commands; print its one line of result, or its error, one line per mistake.

    A mistake of the user's, in the command line too, ends with exit code 2, a full disk and the like with 1. Elsewhere than on
    a terminal standard error tells how far it is. Stopped by Ctrl-C or SIGTERM, it says so in one line, once what can be gone
    on with is saved.

    The parameters of ``mains`` are the options, their modules' docstrings the help. Several are commands, each named by its
    module; to name none is to ask for help.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # of GGUF files being dequantised
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name_the_user()
    sys.excepthook = _unexpected
    before = {asking: signal.getsignal(asking) for asking in (signal.SIGINT, signal.SIGTERM, PARENT_ENDED)}
    for asking in (signal.SIGTERM, PARENT_ENDED):
        signal.signal(asking, stop)
    try:
        if "DVC_STAGE" in os.environ:  # a killed `dvc repro` leaves nothing behind that writes beside the next one
            end_with_parent(PARENT_ENDED, os.getppid())
            if is_orphan():
                stop(PARENT_ENDED)
        with Display(_title(), [""], bars=False, age=_age()) as display:
            display.report("")(0, 0, "starting")
            result = _called(*mains)
        with writing(Path("standard output")):
            print(result, flush=True)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None
    except typer.TyperException as error:
        print(fitted(redacted(" ".join(error.format_message().split()))), file=sys.stderr)
        raise SystemExit(2) from None
    except (UserError, NumericsError) as error:
        print("\n".join(map(fitted, redacted(str(error)).split("\n"))), file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenProcessPool:
        print("a worker process was killed (out of memory?); run the same command again to go on", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as stopped:
        number: int = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        while before:  # it is over: whoever passes the signal on, or ends, may do so later
            signal.signal(before.popitem()[0], signal.SIG_IGN)
        word = "interrupted" if number == signal.SIGINT else "stopped"
        print(f"{word}; run the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except Exception as error:
        line = fault_line(error)
        if line is None:
            raise
        _give_up_output()
        print(line, file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        while _locks:
            _locks.popitem()[1].close()
        for asking, handler in before.items():
            signal.signal(asking, handler)


def _called(*mains: Callable[..., str]) -> str:
    """What the command that the command line names returns."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"max_content_width": 120})
    for main in mains:
        about = sys.modules[main.__module__].__doc__ or ""
        app.command(main.__module__.rpartition(".")[2], help=about, short_help=about.split("\n")[0])(main)
    options = sys.argv[1:] or ["--help"] * (len(mains) > 1)
    # Its main() would hide which signal has stopped it.
    with typer.main.get_command(app).make_context(_program(), options) as context:
        result: str = context.command.invoke(context)
    return result


def name_the_user() -> None:
    """Call a user without a name by the number: containers run under ids that their passwd file does not have.

    Libraries ask for the name, too, mostly to make a folder's or a record's name of it, and fail without one.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = str(os.getuid())


def _unexpected(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    """Say what nobody has expected as Python does, without what lets people in somewhere."""
    print(redacted("".join(traceback.format_exception(kind, error, place))), end="", file=sys.stderr)


def _give_up_output() -> None:
    """Python would say at its end, in several lines, that what has not been written still cannot be."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _age() -> float:
    """Seconds that this process has spent on getting here; 0 if it has done something else before."""
    with contextlib.suppress(psutil.Error, OSError):
        age: float = time.time() - psutil.Process().create_time()
        return age if 0 < age < 3 else 0.0
    return 0.0


def _program() -> str:
    """What the command line begins with."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _title() -> str:
    """The stage or command, and what it was asked for."""
    command = [word for word in sys.argv[1:2] if not word.startswith("-")] or [Path(sys.argv[0]).stem]
    named = [value for option, value in itertools.pairwise(sys.argv) if option in NAMES]
    return " ".join([*command, "-".join(named)]).rstrip()
