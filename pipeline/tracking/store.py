"""Where runs are kept, and what identifies the code and settings of a run."""

import getpass
import logging
import os
import subprocess
import sys
from pathlib import Path

from pipeline.settings.params import Config
from pipeline.tracking.datasets import dataset_inputs
from pipeline.tracking.parents import ParentRun
from pipeline.tracking.patience import PATIENT, Away, patient, readable
from pipeline.tracking.remote import client_of, experiment_id
from pipeline.tracking.send import AWAY, refusal, send_waiting
from pipeline.tracking.spool import waiting
from pipeline.tracking.training import RunSettings, Store, flatten
from pipeline.workspace.addresses import shown
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Cache
from pipeline.workspace.yaml_files import yaml_text


def store_of(config: Config, root: Path) -> Store:
    """The store: params.yaml's URI, else MLFLOW_TRACKING_URI, else mlflow.db in the project's root (absolute)."""
    here = f"sqlite:///{(root / 'mlflow.db').resolve()}"
    return Store(config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or here, root.resolve() / Cache().folder)


def open_store(store: Store, experiment: str) -> tuple[int, int]:
    """Create store and experiment if they are not there, and send what was kept while the store was away.

    Done once before processes write to the store: a new database is migrated for some seconds. To be called in a process
    of its own (``in_own_process``) if this one forks later: SQLite connections must not be carried across a fork.

    Returns:
        How many runs' records were sent, and how many are still kept.

    Raises:
        UserError: the URI cannot be used. A server that does not answer is not a mistake: there is a warning.
    """
    quiet()
    try:
        with patient(PATIENT):
            experiment_id(client_of(store.uri, store.cache), experiment)
    except Exception as error:  # MLflow's, SQLAlchemy's, Alembic's and a driver's have no common base
        if refusal(error) or not isinstance(error, AWAY) or not store.uri.startswith("http"):
            said = readable(str(error) or type(error).__name__, store.uri)
            raise UserError(f"tracking.uri: {readable(shown(store.uri))}: cannot be used: {said}") from None
        Away(store.cache, store.uri).note(str(error))
        return 0, len(waiting(store.cache))
    return send_waiting(store.uri, store.cache)


def quiet() -> None:
    """MLflow's and Alembic's start-up messages are not for this pipeline's users."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_settings(
    config: Config, root: Path, environment: str, method: str, datasets: dict[str, Path]
) -> dict[int, RunSettings]:
    """What the runs of a method on an environment carry, by seed; the trainings are made from ``datasets``."""
    resolved = config.model_dump(mode="json")
    relevant = {key: resolved[key] for key in ("policy", "rollout", "train", "evaluation")}
    relevant |= {"environment": resolved["environments"][environment], "method": resolved["methods"][method]}
    params, tags = flatten(relevant), {**provenance(config, root), "environment": environment, "method": method}
    inputs, texts = dataset_inputs(datasets, root), {"params.yaml": resolved_params(config)}
    return {
        seed: RunSettings(
            store=store_of(config, root),
            experiment=environment,
            name=f"{config.comparison} {method} seed {seed}",
            parent={"name": config.comparison, "identity": comparison_identity(config)},
            tags={**tags, "seed": str(seed)},
            params={**params, "seed": seed},
            datasets=inputs,
            texts=texts,
            traces=config.tracking.traces,
            episodes=config.tracking.episodes,
        )
        for seed in config.seeds
    }


def study_run(config: Config, root: Path, environment: str, name: str) -> ParentRun:
    """The run of a sweep's study, to which ``log_trial`` and ``log_parent`` write."""
    tags = {**provenance(config, root), "environment": environment}
    return ParentRun(store_of(config, root), environment, name, {"kind": "study", "study": name}, tags)


def comparison_identity(config: Config) -> dict[str, str]:
    """Tags by which a comparison's run is found in an environment's experiment."""
    return {"kind": "comparison", "comparison": config.comparison}


def resolved_params(config: Config) -> str:
    """All settings, defaults included, as a params file that reads as the same configuration.

    Addresses of stores are left out: they may hold passwords, and decide no result.
    """
    return yaml_text(config.model_dump(mode="json", exclude={"tracking": {"uri"}, "sweep": {"storage"}}))


def provenance(config: Config, root: Path) -> dict[str, str]:
    """Tags that say which code and which command a run came from: git revision, DVC stage and experiment.

    They are for the record: what cannot be found out is left open.
    """
    revision = _git_revision(root)
    tags = {
        "comparison": config.comparison,
        "git.revision": revision,
        "mlflow.source.git.commit": revision.removesuffix("+changes"),
        "mlflow.source.name": "/".join(Path(sys.argv[0]).parts[-2:]),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user(),
    }
    return tags | {key.lower(): os.environ[key] for key in ("DVC_STAGE", "DVC_EXP_NAME") if os.environ.get(key)}


def user() -> str:
    """The name of whoever runs this, or the number if the machine knows no name for it, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def _git_revision(root: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, no repository, or somebody else's
        return "unknown"
