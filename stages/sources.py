"""Note what decides results without standing in params.yaml (code, files, builds), and refuse a wrong params file.

DVC runs this first and always: every other stage depends on what it writes, and goes on only where that has changed.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from pipeline.commands.cli import ParamsFile, configured, make_alone, next_command, run


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(os.path.normpath(params))
    from pipeline.analysis.registration import journal, register
    from pipeline.sources.checks import check_made, check_named
    from pipeline.sources.code import of_machine
    from pipeline.sources.dvc_cache import drop_damaged
    from pipeline.sources.fingerprints import of_environment, of_policy, of_row
    from pipeline.sources.noted import drop_earlier
    from pipeline.workspace.files import write_record

    check_named(config, params)
    check_made(layout, Path(params).with_name("dvc.lock"))
    make_alone(layout, "sources")
    drop_damaged(Path(params).with_name("dvc.lock"))
    folder = layout.sources
    registration = register(config, layout.hypotheses)
    found = {
        **{f"environments/{name}": of_environment(section) for name, section in config.environments.items()},
        **{f"methods/{name}": of_row(config, name) for name in config.methods},
        "policy": of_policy(config.policy),
        "machine": of_machine(),
        "sweep": config.sweep.model_dump(mode="json", exclude={"storage"}),  # an address belongs into no dvc.lock
        "seeds": {"seeds": list(config.seeds)},
        "registration": registration,
    }
    for name, fingerprint in found.items():
        write_record(folder / f"{name}.json", fingerprint)
    drop_earlier(folder, found)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    opened = any(layout.evaluations("", "").parent.glob("*.parquet"))
    write_record(layout.registered, {"states": journal(registration, layout.registered, opened, now)})
    rule = config.seeds_until
    more = (
        ""
        if rule is None
        else f"{len(config.seeds)} of at most {rule.at_most} seeds are in effect: `make repro` adds more. "
    )
    return f"{folder}: what params.yaml only names. {more}{next_command(params, 'python -m stages.policy')}"


if __name__ == "__main__":
    run(main)
