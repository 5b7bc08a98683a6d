"""What a params file names is there: its environments can be made, and it is the file that it says it is."""

from __future__ import annotations

import os

from pipeline.environments import make
from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError


def check_named(config: Config, params: str) -> None:
    """Make each environment once, which imports its module and gives it its settings.

    Args:
        config: the params file.
        params: its path from the root, where the process works.

    Raises:
        UserError: ``params_file`` names another file, whose names commands would have that nobody has checked; or an
            environment cannot be made.
    """
    if os.path.abspath(config.params_file) != os.path.abspath(params):
        raise UserError(f"{params}: params_file: {config.params_file!r} is another file; allowed: {params}")
    for section in config.environments.values():
        make(section)
