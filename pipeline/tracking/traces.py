"""Episodes as traces: a span per turn with what was shown, what was written and every token's energy."""

import base64
import hashlib
import json
from typing import Any

from mlflow.entities import Span, SpanType, TraceInfo, TraceLocation, TraceState
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey

from pipeline.tracking.records import Record

TURN_NS = 1_000_000
"""Length of a turn's span: turns of many episodes are decoded together, so none has a duration of its own."""


def log_trace(uri: str, experiment: str, run_id: str, record: Record) -> None:
    """Send an episode as a trace of a run. Ids follow from run and episode, so that sending again replaces it.

    The record has ``episode`` (see ``pipeline.trajectories.records.episode_records``) and ``time`` in ms.
    """
    episode, start = record["episode"], record["time"]
    digest = hashlib.sha256(f"{run_id} {episode['id']}".encode()).digest()[:16]
    trace_id, turns = f"tr-{digest.hex()}", episode["turns"]
    inputs = {"state": episode["state"]}
    outputs = {key: episode[key] for key in ("return", "success", "end")}
    began = start * 1_000_000
    root = _attributes(SpanType.AGENT, inputs, outputs)
    spans = [_span(digest, 0, episode["id"], began, len(turns), root)]
    for index, turn in enumerate(turns):
        spans.append(_span(digest, index + 1, f"turn {index + 1}", began + index * TURN_NS, 1, _turn(turn)))
    client = TracingClient(uri)
    client.log_spans(experiment, spans)
    client.start_trace(
        TraceInfo(
            trace_id=trace_id,
            trace_location=TraceLocation.from_experiment_id(experiment),
            request_time=start,
            state=TraceState.OK,
            request_preview=json.dumps(inputs),
            response_preview=json.dumps(outputs),
            execution_duration=len(turns) * TURN_NS // 1_000_000,
            trace_metadata={TraceMetadataKey.SOURCE_RUN: run_id},
            tags={TraceTagKey.TRACE_NAME: episode["id"]},
        )
    )


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a turn's span; numbers of tokens are lists, in the order of ``text``."""
    tokens = {name: values for name, values in turn["tokens"].items() if any(value is not None for value in values)}
    own = {key: turn[key] for key in ("action", "valid", "response", "ended", "reward")}
    outputs = {"response": "".join(turn["tokens"]["text"])}
    return _attributes(SpanType.LLM, {"shown": turn["shown"]}, outputs) | own | tokens


def _attributes(kind: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    return {SpanAttributeKey.SPAN_TYPE: kind, SpanAttributeKey.INPUTS: inputs, SpanAttributeKey.OUTPUTS: outputs}


def _span(trace: bytes, number: int, name: str, start: int, turns: int, attributes: dict[str, Any]) -> Span:
    """Span ``number`` of a trace; 0 is the root. ``start`` is in nanoseconds."""
    attributes = {SpanAttributeKey.REQUEST_ID: f"tr-{trace.hex()}", **attributes}
    return Span.from_dict(
        {
            "trace_id": base64.b64encode(trace).decode(),
            "span_id": _span_id(number),
            "parent_span_id": _span_id(0) if number else None,
            "name": name,
            "start_time_unix_nano": start,
            "end_time_unix_nano": start + turns * TURN_NS,
            "status": {"code": "STATUS_CODE_OK", "message": ""},
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
            "events": [],
        }
    )


def _span_id(number: int) -> str:
    return base64.b64encode((number + 1).to_bytes(8, "big")).decode()
