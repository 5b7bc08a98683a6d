"""``actfocus``: all that is no stage of the DAG. Each command is the ``main`` of the module of its name."""

import os
import sys
from importlib import import_module

from pipeline.commands.cli import run

COMMANDS = (
    *("check", "plan", "methods", "contracts", "preset"),  # before a run
    *("repro", "serve"),
    *("play", "compare", "bottleneck", "replay", "decisions", "confirm", "export"),  # of one
    *("sync", "publish", "simulate", "screenshots"),  # after it
)


def main() -> None:
    """Run the command; modules in the folder that it is called from are found, as they are by ``python -m``."""
    sys.path.insert(0, os.getcwd())
    run(*(import_module(f"pipeline.commands.{name}").main for name in COMMANDS))


if __name__ == "__main__":
    main()
