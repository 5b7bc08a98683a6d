"""Run the whole pipeline.

Where seeds are added until the comparison is decided, it is run again with a batch more after each look that has not
decided it. Seeds that have been trained stay; killed and started again, it goes on with the same looks.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.cli import ParamsFile, configured, make_alone, reproduce

if TYPE_CHECKING:
    from pipeline.settings.params import Config

ASIDE = {
    "compare",
    "report",
    "root",
    "out",
    "params_file",
    "overwrite_outside_root",
    "seeds",
    "seeds_until",
    "sweep",
    "tracking",
    "workers",
}
"""Settings of which no training and no played episode knows anything."""


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params)
    make_alone(layout, "repro")
    from pipeline.analysis.comparison import read_comparison
    from pipeline.report.declared import look_line
    from pipeline.sources.seeds_in_effect import in_effect, note
    from pipeline.workspace.files import read_record, write_record
    from pipeline.workspace.manifest import listed_text

    pipeline, rule = Path(params).with_name("dvc.yaml"), config.seeds_until
    if rule is None:
        reproduce(pipeline)
    else:
        settings, count = settings_hash(config), 0
        known = read_record(layout.looks)["settings"] if layout.looks.exists() else settings
        wanted = len(config.seeds) if known == settings else rule.at_least
        while count != wanted:
            count = wanted
            note(in_effect(config, count), layout.seeds_in_effect)
            reproduce(pipeline)
            comparison = read_comparison(layout)
            look = comparison["look"]
            write_record(layout.looks, {"settings": settings, "looks": look["looks"]})
            print(look_line(comparison), flush=True)
            wanted = look["next_seeds"]
    return listed_text(layout.plots, layout.reports / "comparison.txt").rstrip("\n")


def settings_hash(config: Config) -> str:
    """Of all settings but those ``ASIDE``: where it is another one, looks begin anew."""
    settings = config.model_dump(mode="json", exclude=ASIDE)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
