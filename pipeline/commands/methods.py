"""Print the methods of a params file: slots, settings, source, status."""

from __future__ import annotations

import argparse

from pipeline.commands.command import run


def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", default="presets/methods/params.yaml")
    params = parser.parse_args().params
    from pipeline.report.methods import method_table
    from pipeline.settings.params import load

    config = load(params)
    return method_table(config.methods, config.method_defaults)


if __name__ == "__main__":
    run(main)
