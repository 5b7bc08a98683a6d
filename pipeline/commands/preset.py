"""Resolve a preset: write presets/<name>/params.yaml from params.yaml and the preset's overlay."""

from __future__ import annotations

from pathlib import Path

from pipeline.commands.command import go_to_root, parse_arguments, root_of, run


def main() -> str:
    arguments = parse_arguments(__doc__, "name")
    name = arguments.name
    from pipeline.settings.presets import resolve_preset

    go_to_root(arguments, root_of(arguments.params))

    target = resolve_preset(name, Path("."))
    return f"{target}. Next: dvc repro presets/{name}/dvc.yaml"


if __name__ == "__main__":
    run(main)
