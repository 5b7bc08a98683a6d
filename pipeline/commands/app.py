"""``actfocus``: all that is no stage of the DAG. Each command is the ``main`` of the module of its name."""

from __future__ import annotations

import os
import sys

from pipeline.commands import (
    check,
    compare,
    confirm,
    contracts,
    decisions,
    match,
    methods,
    play,
    preset,
    publish,
    replay,
    screenshots,
    sync,
)
from pipeline.commands.cli import run

COMMANDS = (
    *(check, methods, contracts, preset),  # before a run
    *(play, compare, replay, decisions, match, confirm),  # of a run
    *(sync, publish, screenshots),  # after it
)


def main() -> None:
    """Run the command; modules in the folder that it is called from are found, as they are by ``python -m``."""
    sys.path.insert(0, os.getcwd())
    run(*(command.main for command in COMMANDS))


if __name__ == "__main__":
    main()
