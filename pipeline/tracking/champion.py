"""The best training of a comparison as a registered model with the alias ``champion``.

A ``champion`` record has ``model`` (the policy's directory), ``digest`` (its hash, see ``dvc_digest``), ``name`` (of the
registered model), ``dtype`` and ``tags`` of the version.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.transformers
import transformers
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.model.adapters import merged
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.tracking.datasets import dvc_digest
from pipeline.tracking.patience import Patience, patient
from pipeline.tracking.records import Record
from pipeline.workspace.errors import line_of

ALIAS = "champion"
UPLOAD = Patience(600, 1)
"""For requests that carry weights."""


def register(client: MlflowClient, uri: str, run_id: str, record: Record) -> None:
    """Register a policy and make it the champion, unless the champion has these very files.

    The model goes to the comparison's run. A directory that holds other files by now is left alone: a later comparison has
    a record of its own.

    Raises:
        MlflowException: the store refuses it, or MLflow cannot save this kind of model.
    """
    name, digest, directory = record["name"], record["digest"], Path(record["model"])
    if _champion_digest(client, name) == digest:
        return
    policy = _policy(directory, digest, record["dtype"])
    if policy is None:
        return
    with patient(UPLOAD):
        model = _log_model(uri, run_id, policy)
        tags = {**record["tags"], "digest": digest}
        made = client.create_model_version(
            name, model.model_uri, run_id, tags, await_creation_for=0, model_id=model.model_id
        )
        client.set_registered_model_alias(name, ALIAS, made.version)


def _policy(directory: Path, digest: str, dtype: str) -> Policy | None:
    """The policy of a directory, None if it is another one by now.

    Raises:
        MlflowException: it cannot be read, for which the store is not to blame.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        if not directory.is_dir() or dvc_digest(directory) != digest:
            return None
        # It will only be saved. MLflow keeps adapters beside a base that has a name on the hub, and this one has none.
        return merged(load_policy(directory, dtype=dtype, context=1))
    except Exception as error:
        raise MlflowException(f"{directory}: {line_of(error)}", INVALID_PARAMETER_VALUE) from error


def _champion_digest(client: MlflowClient, name: str) -> str | None:
    """What the champion's files are known by; makes the registered model if it is not there."""
    try:
        known = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        client.create_registered_model(name)
        return None
    if ALIAS not in known.aliases:
        return None
    tags: dict[str, str] = client.get_model_version(name, known.aliases[ALIAS]).tags
    return tags.get("digest")


def _log_model(uri: str, run_id: str, policy: Policy) -> Any:
    """Log the policy as MLflow's transformers flavour: ``model/`` in it is a Hugging Face directory (safetensors)."""
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # Named here, because MLflow would find out by loading the model in another process.
    requirements = [f"{package}=={version(package)}" for package in ("torch", "transformers")]
    with mlflow.start_run(run_id=run_id):
        try:
            return mlflow.transformers.log_model(
                {"model": policy.model, "tokenizer": policy.tokenizer},
                name="policy",
                task="text-generation",
                pip_requirements=requirements,
            )
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise MlflowException(f"the champion cannot be saved by MLflow: {error!r}") from error
