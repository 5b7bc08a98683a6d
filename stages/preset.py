"""Resolve a preset: write presets/<name>/params.yaml from params.yaml and the preset's overlay."""

from __future__ import annotations

from pathlib import Path

from stages.command import parse_arguments, run


def main() -> str:
    name = parse_arguments(__doc__, "name").name
    from pipeline.presets import resolve_preset

    target = resolve_preset(name, Path("."))
    return f"{target}. Next: dvc repro presets/{name}/dvc.yaml"


if __name__ == "__main__":
    run(main)
