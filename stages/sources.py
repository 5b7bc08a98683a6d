"""Note what decides results without standing in params.yaml (code, files, builds), and refuse a wrong params file.

DVC runs this first and always: every other stage depends on what it writes, and goes on only where that has changed.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.commands.command import configured, layout_of, next_command, parse_arguments, run


def main() -> str:
    arguments = parse_arguments(__doc__)
    arguments.params = os.path.normpath(arguments.params)
    config = configured(arguments)
    from pipeline.settings.custom import custom_sections
    from pipeline.settings.presets import require_made
    from pipeline.sources.fingerprints import of_environment, of_machine, of_method, of_policy
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import write_json

    if config.params_file != arguments.params:  # commands have what stands there, and it would not have been checked
        raise UserError(
            f"{arguments.params}: params_file: {config.params_file!r} is another file; allowed: {arguments.params}"
        )
    if any(map(custom_sections, (config.method_defaults, *config.methods.values()))):
        from pipeline.objective.custom import check_functions  # seconds, of which most params files need none

        check_functions(config, arguments.params)
    require_made(Path(arguments.params), Path("."))
    folder = layout_of(config).sources
    found = {
        **{f"environments/{name}": of_environment(section) for name, section in config.environments.items()},
        **{f"methods/{name}": of_method(method) for name, method in config.methods.items()},
        "policy": of_policy(config.policy),
        "machine": of_machine(),
    }
    for name, fingerprint in found.items():
        write_json(folder / f"{name}.json", fingerprint)
    for file in folder.rglob("*.json"):
        if file.relative_to(folder).with_suffix("").as_posix() not in found:
            file.unlink()
    return f"{folder}: what params.yaml only names. {next_command(arguments, 'policy')}"


if __name__ == "__main__":
    run(main)
