"""What every stage's command line shares: its arguments, and one-line errors with exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pipeline.config import Config, ConfigError, load
from pipeline.finite import NumericsError
from pipeline.trajectory import TrajectoryError


def parse_arguments(description: str | None, *names: str) -> argparse.Namespace:
    """``--params`` and one required option per name."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--params", default="params.yaml", help="params file (default: params.yaml)")
    for name in names:
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args()


def configured(arguments: argparse.Namespace) -> Config:
    """The checked params file, with the named environment and method known to it.

    Raises:
        ConfigError: the file is wrong, or does not have that environment or method.
    """
    config = load(arguments.params)
    for name, section, extra in (("environment", "environments", ()), ("method", "methods", ("reference",))):
        value = getattr(arguments, name, None)
        allowed = [*getattr(config, section), *extra]
        if value is not None and value not in allowed:
            raise ConfigError(f"{arguments.params}: {section}: {value!r} is not there; allowed: {', '.join(allowed)}")
    return config


def out_folder(config: Config) -> Path:
    """Folder that receives data/, models/ and reports/; stages run in the project's root."""
    return Path(config.out)


def next_command(arguments: argparse.Namespace, stage: str, **options: str) -> str:
    """``Next: `` and the command that goes on from here, with this run's params file and the stage's options."""
    named = {"params": arguments.params} if arguments.params != "params.yaml" else {}
    return " ".join(
        [f"Next: python -m stages.{stage}", *(f"--{name} {value}" for name, value in {**named, **options}.items())]
    )


def run(main: Callable[[], str]) -> None:
    """Run a stage; print its one line of result, or its error, one line per mistake, and exit with 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        print(main())
    except (ConfigError, TrajectoryError, NumericsError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenProcessPool:
        print("a worker process was killed (out of memory?); run the same command again to go on", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
