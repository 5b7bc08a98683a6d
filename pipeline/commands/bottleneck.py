"""Put the Action Bottleneck of every environment into one table.

Does token energy go with the variance of returns? The stage of this name has measured it.
"""

from pipeline.commands.cli import ParamsFile, configured, make_alone


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params)
    make_alone(layout, "bottleneck")
    from pipeline.report.bottleneck_table import bottleneck_table
    from pipeline.report.tables import aligned, markdown
    from pipeline.trajectories.table import read
    from pipeline.workspace.files import read_record, write_text

    found = {name: read_record(layout.bottleneck(name) / "bottleneck.json") for name in config.environments}
    responses = {name: read(layout.trajectories(name)).responses for name in config.environments}
    table = bottleneck_table(config.comparison, found, responses)
    text = aligned([table.header, *table.rows])
    write_text(layout.reports / "bottleneck.txt", f"{table.title}\n{text}\n")
    write_text(layout.reports / "bottleneck.md", f"{table.title}\n\n{markdown(table)}\n")
    return f"{table.title}\n{text}\n{layout.reports / 'bottleneck.md'}: the same. Next: make publish, or the pictures beside it"
