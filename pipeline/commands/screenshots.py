"""Take pictures of the report and of MLflow for docs/figures.

Needs Chromium.
"""

from pathlib import Path

from pipeline.commands.cli import ParamsFile, configured, make_alone

PICTURES = ("report", "viewer", "mlflow")


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, _ = configured(params)
    make_alone(layout, "screenshots")
    from pipeline.progress.display import doing
    from pipeline.report.screenshots import chromium, shoot_mlflow, shoot_report
    from pipeline.tracking.noted import noted_runs
    from pipeline.tracking.store import store_of
    from pipeline.workspace.errors import UserError

    folder = Path("docs/figures")
    environment = next(iter(config.environments))
    noted = [noted_runs(layout.runs(environment, method)) for method in config.methods]
    first = str(config.seeds[0])
    runs = [seeds[first]["run_id"] for seeds in noted if first in seeds and seeds[first]["run_id"]]
    if not runs:
        raise UserError(f"{layout.all_runs}: no run of {environment} has reached MLflow's store")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if config.out == "." else f"{config.comparison}-"
    targets = {name: folder / f"{prefix}{name}.png" for name in PICTURES}
    doing("starting Chromium")
    with chromium() as browser:
        doing("the report")
        shoot_report(browser, layout.reports / "index.html", targets["report"], targets["viewer"])
        doing("MLflow's comparison")
        shoot_mlflow(browser, store_of(config, Path(".")).uri, environment, runs, targets["mlflow"])
    return f"{folder}: {', '.join(path.name for path in targets.values())}. Next: look at them, then `make publish`"
