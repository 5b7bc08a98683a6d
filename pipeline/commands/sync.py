"""Send to MLflow what was kept in .cache while its server was away."""

from __future__ import annotations

from pathlib import Path

from pipeline.commands.command import configured, parse_arguments, run


def main() -> str:
    config = configured(parse_arguments(__doc__))
    from pipeline.progress.display import doing
    from pipeline.tracking.store import open_store, store_of

    doing("sending what was kept")
    store = store_of(config, Path("."))
    sent, kept = open_store(store, next(iter(config.environments)))
    return f"{store.uri}: {sent} runs sent, {kept} still kept in {store.cache}. Next: make ui"


if __name__ == "__main__":
    run(main)
