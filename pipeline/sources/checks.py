"""A params file is the file that it says it is, is made from what it says, and names functions that are there.

What stands where its results will be was made here.
"""

import os
from pathlib import Path

from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.settings.presets import require_made
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Layout
from pipeline.workspace.ours import LISTED, require_ours
from pipeline.workspace.yaml_files import LARGEST_LOCK, read_yaml


def check_made(layout: Layout, noted: Path) -> None:
    """Refuse policies that were not made here, where DVC would delete them before a stage runs.

    One without a list of its files is known by the dvc.lock ``noted``.

    Raises:
        UserError: a file is named.
    """
    for folder in (layout.policy, *sorted(layout.trained("", "").parent.glob("*"))):
        if folder.is_dir() and (any(folder.rglob(LISTED)) or os.path.relpath(folder) not in _outs(noted)):
            require_ours(folder)


def _outs(noted: Path) -> set[str]:
    """Paths of what DVC has made, from the root."""
    try:
        stages = read_yaml(noted, LARGEST_LOCK)["stages"].values() if noted.exists() else ()
        return {str(out["path"]) for stage in stages for out in stage.get("outs", ())}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{noted}: not a lock of DVC's; delete it, and `dvc repro` makes it anew") from None


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
