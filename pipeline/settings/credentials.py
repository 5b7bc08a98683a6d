"""A params file is committed, and copied into dvc.lock, MLflow and reports: it has no password, token or key."""

import re
from collections.abc import Iterator
from typing import Any

from pipeline.workspace.addresses import has_secret, redacted

PLACES = {
    "tracking.uri": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI as a whole",
    "sweep.storage": "PGPASSWORD or ~/.pgpass, or SWEEP_STORAGE as a whole",
    "rollout.engine.url": "VLLM_API_KEY",
    "rollout.engine.arguments": "VLLM_API_KEY or HF_TOKEN",
}
"""Variables of the environment, and files that Git does not see, by the settings whose credentials they hold."""
_NAMES = re.compile(
    r"(.*[_.-])?(password|passwd|api[_-]?key|hf[_-]token|(access|auth)[_-]token|(client|secret)[_-](key|secret))", re.I
)
"""Of settings and of options, that can be nothing else."""


def committed_secrets(raw: Any, source: str) -> list[str]:
    """A line for each setting of a parsed params file that lets people in somewhere; the lines themselves do not."""
    return [
        f"{source}: {redacted(key)[:100]}: has a password, token or key, and this file is committed; allowed: "
        f"{PLACES.get(_setting(key), 'a variable of the environment')}"
        for key, value in _texts(raw)
        if _lets_in(key, value)
    ]


def _lets_in(key: str, value: str) -> bool:
    option = value.partition("=")[0]
    named = _NAMES.fullmatch(key.rpartition(".")[2]) or (option.startswith("--") and _NAMES.fullmatch(option[2:]))
    return bool(value and named) or has_secret(value) or has_secret(key)


def _setting(key: str) -> str:
    """A dotted key without the places of lists."""
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def _texts(raw: Any) -> Iterator[tuple[str, str]]:
    """Dotted key and value of every text in a parsed file, in their order."""
    waiting: list[tuple[str, Any]] = [("", raw)]
    while waiting:
        key, value = waiting.pop()
        below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [(f"{key}.{name}" if key else str(name), part) for name, part in reversed(list(below))]
        if isinstance(value, str):
            yield key, value
