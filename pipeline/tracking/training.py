"""One MLflow run per training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient

from pipeline.prompting import decode
from pipeline.trajectory import Trajectories


@dataclass(frozen=True)
class RunSettings:
    """Where a training's run goes and what it carries."""

    uri: str
    experiment: str
    name: str
    tags: dict[str, str]
    params: dict[str, Any]
    """The resolved configuration, flat keys."""
    traces: int
    """Episodes stored as traces."""


class TrainingRun:
    """The MLflow run of one training; a resumed training goes on in its first run.

    Args:
        settings: see ``RunSettings``.
        folder: keeps the run's id between a kill and a resumption.
    """

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        _quiet()
        self._settings = settings
        memory = folder / "mlflow_run_id"
        known = memory.read_text(encoding="utf-8").strip() if memory.exists() else None
        if known and not _exists(settings.uri, known):
            known = None
        self.logger = MLFlowLogger(
            experiment_name=settings.experiment,
            run_name=settings.name,
            tracking_uri=settings.uri,
            tags=dict(settings.tags),
            run_id=known,
        )
        self._client: MlflowClient = self.logger.experiment
        self.run_id = str(self.logger.run_id)
        if known is None:
            self.logger.log_hyperparams(settings.params)
            memory.write_text(self.run_id, encoding="utf-8")

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        """All metrics of one iteration, in one call; ``step`` is the iteration."""
        self.logger.log_metrics(metrics, step=iteration)

    def finish(self, tokenizer: Any, episodes: Trajectories | None) -> dict[str, str]:
        """Store sampled episodes as traces, end the run, and say where it is."""
        if self._settings.traces and episodes is not None:
            chosen = episodes.select(range(min(self._settings.traces, len(episodes))))
            log_traces(self._settings.uri, self._settings.experiment, self.run_id, tokenizer, chosen)
        self.logger.finalize("success")
        return {
            "run_id": self.run_id,
            "experiment": self._settings.experiment,
            "name": self._settings.name,
            "comparison": self._settings.tags.get("comparison", ""),
        }


def log_traces(uri: str, experiment: str, run_id: str, tokenizer: Any, episodes: Trajectories) -> None:
    """Each episode as a trace with a span per turn: what was shown, what was written, the tokens' numbers."""
    # Exported in the background they would have to be waited for, with threads that look for work once a second.
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_id=run_id):
        for episode in range(len(episodes)):
            _log_trace(tokenizer, episodes.select([episode]))
    mlflow.flush_trace_async_logging()


def _log_trace(tokenizer: Any, episode: Trajectories) -> None:
    columns = episode.episodes
    with mlflow.start_span(name=columns["episode_id"][0], span_type="AGENT") as root:
        root.set_inputs({"state": columns["state_key"][0]})
        position = 0
        for turn, (start, end) in enumerate(zip(episode.turns["start"], episode.turns["end"], strict=True)):
            with mlflow.start_span(name=f"turn {turn + 1}", span_type="LLM") as span:
                span.set_inputs({"shown": tokenizer.decode(episode.input_ids[position:start])})
                span.set_outputs({"response": decode(tokenizer, episode.input_ids[start:end].tolist()).text})
                span.set_attributes(
                    {
                        "action": episode.turns["action"][turn],
                        "valid": bool(episode.turns["valid"][turn]),
                        "reward": float(episode.turns["reward"][turn]),
                        "role": episode.role[start:end].tolist(),
                        "logprob": _rounded(episode.logprob[start:end]),
                        "energy": _rounded(episode.energy[start:end] if episode.energy is not None else []),
                    }
                )
            position = end
        root.set_outputs(
            {"return": columns["return"][0], "success": columns["success"][0], "end": columns["end_reason"][0]}
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def _exists(uri: str, run_id: str) -> bool:
    try:
        MlflowClient(uri).get_run(run_id)
    except mlflow.exceptions.MlflowException:
        return False
    return True


def _quiet() -> None:
    """MLflow's and Alembic's start-up messages are not for this pipeline's users."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
