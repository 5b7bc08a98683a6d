"""MLflow: the only package that imports it."""

import os

# Otherwise every process that imports MLflow starts a thread that reports home, and runs that end print their address.
for _name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
    os.environ.setdefault(_name, "true")
