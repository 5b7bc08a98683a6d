"""Print the methods of a params file: status, source, slots.

A method shows the slots in which it differs from the file's defaults, which stand last.
"""

from __future__ import annotations

from pipeline.commands.cli import ParamsFile, configured


def main(params: ParamsFile = "presets/methods/params.yaml") -> str:
    config, _ = configured(params)
    from pipeline.objective.methods import method_table

    return method_table(config.methods, config.method_defaults)
