"""What a params file names is there: its environments can be made, and it is the file that it says it is."""

import os
from pathlib import Path

from pipeline.environments import make
from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.settings.presets import require_made
from pipeline.workspace.errors import UserError


def check_named(config: Config, params: str) -> None:
    """Make each environment once, which imports its module and gives it its settings; ``params`` is seen from the root.

    Raises:
        UserError: ``params_file`` names another file, whose names commands would have that nobody has checked; or an
            environment cannot be made.
    """
    if os.path.abspath(config.params_file) != os.path.abspath(params):
        raise UserError(f"{params}: params_file: {config.params_file!r} is another file; allowed: {params}")
    require_made(Path(params), Path("."))
    for section in config.environments.values():
        make(section)
    if any(map(custom_sections, (config.method_defaults, *config.methods.values()))):
        from pipeline.objective.custom import check_functions  # seconds, of which most params files need none

        check_functions(config, params)
