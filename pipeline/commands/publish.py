"""Put the latest results into README.md, docs/ and docs/figures."""

from pipeline.commands.cli import ParamsFile, configured, make_alone


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, _ = configured(params)
    make_alone(layout, "publish")
    from pipeline.report.publishing import publish

    return (
        f"README.md, docs/ and docs/figures hold the latest: {', '.join(publish(config))}; what is not there stays as it "
        "was. Next: git diff README.md docs"
    )
