"""Note what decides results without standing in params.yaml (code, files, builds), and refuse a wrong params file.

DVC runs this first and always: every other stage depends on what it writes, and goes on only where that has changed.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.commands.cli import ParamsFile, configured, next_command, out_folder, run


def main(params: ParamsFile = "params.yaml") -> str:
    config, params = configured(os.path.normpath(params))
    from pipeline.sources.checks import check_named
    from pipeline.sources.fingerprints import of_environment, of_machine, of_policy
    from pipeline.workspace.files import write_json

    check_named(config, params)
    folder = out_folder(config) / "data" / "sources"
    for name, section in config.environments.items():
        write_json(folder / "environments" / f"{name}.json", of_environment(section))
    write_json(folder / "policy.json", of_policy(config.policy))
    write_json(folder / "machine.json", of_machine())
    for stale in {file.stem for file in Path(folder, "environments").glob("*.json")} - set(config.environments):
        (folder / "environments" / f"{stale}.json").unlink()
    return f"{folder}: what params.yaml only names. {next_command(params, 'python -m stages.policy')}"


if __name__ == "__main__":
    run(main)
