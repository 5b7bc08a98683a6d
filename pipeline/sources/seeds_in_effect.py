"""Seeds that are in effect: a list is, as a whole; of those that are added until it is decided, the ones added so far.

``data/sources/seeds.json`` has them. Stages that train, play or compare depend on that file, since the params file does
not change when seeds are added.
"""

from pathlib import Path

from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_record, write_record


def with_seeds_in_effect(config: Config, file: Path) -> Config:
    """The configuration whose ``seeds`` are those in effect, as ``file`` has them.

    Without the file, or if it holds none of the numbers of seeds at which this params file looks, they are the first
    look's.
    """
    rule = config.seeds_until
    if rule is None:
        return config
    try:
        record = read_record(file) if file.exists() else None
    except UserError:
        record = None  # damaged: it is made anew
    found = record["seeds"] if isinstance(record, dict) else record
    known = [rule.seeds(count) for count in rule.counts]
    return in_effect(config, len(found) if found in known else rule.at_least)


def in_effect(config: Config, count: int) -> Config:
    """The configuration with the first ``count`` seeds of those that may be added."""
    if config.seeds_until is None:
        return config
    changed: Config = config.model_copy(update={"seeds": config.seeds_until.seeds(count)})
    return changed


def note(config: Config, file: Path) -> None:
    """Write the seeds of the configuration as those in effect."""
    write_record(file, {"seeds": list(config.seeds)})
