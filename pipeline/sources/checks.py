"""A params file is the file that it says it is, is made from what it says, and names functions that are there."""

import os
from pathlib import Path

from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.settings.presets import require_made
from pipeline.workspace.errors import UserError


def check_named(config: Config, params: str) -> None:
    """Check what takes no time, before any stage runs; ``params`` is seen from the root.

    Raises:
        UserError: ``params_file`` names another file, whose names commands would have that nobody has checked; a preset's
            file is older than its overlay; vLLM is to be started and not installed; a function of the user's cannot be
            called as it would be; or ``rollout.workers`` cannot be had.
    """
    if os.path.abspath(config.params_file) != os.path.abspath(params):
        raise UserError(f"{params}: params_file: {config.params_file!r} is another file; allowed: {params}")
    require_made(Path(params), Path("."))
    if config.rollout.engine.kind == "vllm":
        from pipeline.rollout.vllm_server import require_installed

        require_installed(config.rollout.engine)
    if any(map(custom_sections, (config.method_defaults, *config.methods.values()))):
        from pipeline.objective.custom import check_functions  # seconds, of which most params files need none

        check_functions(config, params)
    if config.rollout.workers is not None:
        from pipeline.rollout.ray_pool import check_workers  # likewise

        check_workers(config, config.rollout.workers)
