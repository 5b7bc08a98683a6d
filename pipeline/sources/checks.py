"""A params file is the file that it says it is, is made from what it says, and names functions that are there.

What stands where its results will be was made here.
"""

import configparser
import os
from pathlib import Path

from pipeline.settings.custom import custom_sections
from pipeline.settings.params import Config
from pipeline.settings.presets import require_made
from pipeline.workspace.addresses import SECRET_NAME, has_secret, redacted
from pipeline.workspace.errors import UserError, line_of
from pipeline.workspace.layout import Layout
from pipeline.workspace.ours import LISTED, require_ours
from pipeline.workspace.yaml_files import LARGEST_LOCK, read_yaml

DVC_CONFIG = Path(".dvc/config")
"""What Git has of DVC's settings; ``config.local`` beside it is what it does not have."""
NAMED = ("ask_password", "auth")
"""What is called like a secret, and says how one is asked for."""


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
            called as it would be; DVC's committed settings have a password; or ``rollout.workers`` cannot be had.
    """
    if os.path.abspath(config.params_file) != os.path.abspath(params):
        raise UserError(f"{params}: params_file: {config.params_file!r} is another file; allowed: {params}")
    require_made(Path(params), Path("."))
    require_no_secrets(DVC_CONFIG)
    if config.rollout.engine.kind == "vllm":
        from pipeline.rollout.vllm_server import require_installed

        require_installed(config.rollout.engine)
    if any(map(custom_sections, (config.method_defaults, *config.methods.values()))):
        from pipeline.objective.custom import check_functions  # seconds, of which most params files need none

        check_functions(config, params)
    if config.rollout.workers is not None:
        from pipeline.rollout.ray_pool import check_workers  # likewise

        check_workers(config, config.rollout.workers)


def require_no_secrets(settings: Path) -> None:
    """Refuse DVC's settings, of remotes for example, that let people in, in a file that is committed.

    Raises:
        UserError: a line for each of them; or the file cannot be read.
    """
    found = configparser.RawConfigParser(strict=False, allow_no_value=True)
    try:
        found.read_string(settings.read_text(encoding="utf-8") if settings.exists() else "")
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{settings}: cannot be read: {line_of(error)[:200]}") from None
    wrong = [
        f"{settings}: {redacted(section.strip(chr(39)))}: {name}: has a password, token or key, and this file is committed; "
        f"allowed: {settings}.local (`dvc remote modify --local`), or a variable of the environment"
        for section in found.sections()
        for name, value in found.items(section)
        if value and (has_secret(value) or (SECRET_NAME.fullmatch(name) and name not in NAMED))
    ]
    if wrong:
        raise UserError("\n".join(wrong))
