"""Where runs are kept, and what identifies the code and data of a run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.config import Config, ConfigError, read_yaml
from pipeline.tracking.training import RunSettings, flatten


def tracking_uri(config: Config, root: Path) -> str:
    """The tracking URI: params.yaml, else MLFLOW_TRACKING_URI, else mlflow.db in the project's root (absolute)."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


def prepare_store(uri: str, experiment: str) -> str:
    """Create the store and the experiment if they are not there; returns the experiment's id.

    Done once before processes write to the store: a new database is migrated for some seconds. To be called in a process
    of its own (``in_own_process``) if this one forks later: SQLite connections must not be carried across a fork.

    Raises:
        ConfigError: the store cannot be reached.
    """
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        return str(found.experiment_id if found else client.create_experiment(experiment))
    except (MlflowException, OSError) as error:
        raise ConfigError(f"tracking.uri: {uri}: cannot be used: {str(error).splitlines()[0]}") from None


def run_settings(config: Config, root: Path, environment: str, method: str, seed: int) -> RunSettings:
    """Where the run of one training goes, its name, tags and parameters."""
    uri = tracking_uri(config, root)
    resolved = config.model_dump(mode="json")
    relevant = {key: resolved[key] for key in ("policy", "rollout", "train", "evaluation")}
    relevant |= {"environment": resolved["environments"][environment], "method": resolved["methods"][method]}
    return RunSettings(
        uri=uri,
        experiment=environment,
        name=f"{config.comparison} {method} seed {seed}",
        tags={**provenance(config, root), "environment": environment, "method": method, "seed": str(seed)},
        params={**flatten(relevant), "seed": seed},
        traces=config.tracking.traces,
    )


def provenance(config: Config, root: Path) -> dict[str, str]:
    """Tags that say which code and data a run had: git revision, DVC stage and experiment, DVC hashes of its inputs."""
    tags = {"comparison": config.comparison, "git.revision": _git_revision(root)}
    tags |= {key.lower(): os.environ[key] for key in ("DVC_STAGE", "DVC_EXP_NAME") if os.environ.get(key)}
    lock = root / Path(config.params_file).parent / "dvc.lock"
    if lock.exists():
        for stage, entry in read_yaml(lock).get("stages", {}).items():
            if stage.split("@")[0] in ("policy", "annotate"):
                tags |= {f"dvc.{stage}.{Path(o['path']).name}": o["md5"] for o in entry.get("outs", []) if "md5" in o}
    return tags


def _git_revision(root: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
