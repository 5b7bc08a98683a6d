"""One MLflow run per comparison: its headline numbers, its tables and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.config import Config
from pipeline.tracking.store import prepare_store, provenance, tracking_uri


def log_comparison(config: Config, root: Path, comparison: dict[str, Any], reports: Path) -> None:
    """Log a comparison per environment: success of each method as metrics, and the report as artifacts."""
    uri = tracking_uri(config, root)
    client = MlflowClient(uri)
    for environment in config.environments:
        experiment = prepare_store(uri, environment)
        tags = {**provenance(config, root), "environment": environment, "kind": "comparison"}
        run = client.create_run(experiment, run_name=f"{config.comparison} comparison", tags=tags)
        for row in comparison["rows"]:
            if row["environment"] == environment:
                place = f"{row['method']}_at_{row['temperature']:g}"
                client.log_metric(run.info.run_id, f"success_{place}", row["success_mean"])
        for file in ("comparison.json", "comparison.md", "index.html"):
            client.log_artifact(run.info.run_id, str(reports / file))
        client.set_terminated(run.info.run_id)
