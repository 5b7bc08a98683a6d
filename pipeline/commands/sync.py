"""Send to MLflow what was kept while its server was away."""

from pathlib import Path

from pipeline.commands.cli import ParamsFile, configured


def main(params: ParamsFile = "params.yaml") -> str:
    config, *_ = configured(params)
    from pipeline.progress.display import doing
    from pipeline.tracking.store import open_store, store_of
    from pipeline.workspace.addresses import shown

    doing("sending what was kept")
    store = store_of(config, Path("."))
    sent, kept = open_store(store, next(iter(config.environments)))
    return f"{shown(store.uri)}: {sent} runs sent, {kept} still kept in {store.cache}. Next: make ui"
