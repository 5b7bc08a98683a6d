"""How long to wait for a store that does not answer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """How long to wait for a store that does not answer."""

    seconds: int
    """For one request."""
    retries: int


HURRIED = Patience(2, 0)
"""While a training waits."""
PATIENT = Patience(20, 1)
"""Between trainings."""


@contextmanager
def patient(patience: Patience) -> Iterator[None]:
    """Have MLflow's requests wait and try again as ``patience`` says; by default it does so for many minutes."""
    values = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(patience.seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(patience.retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
