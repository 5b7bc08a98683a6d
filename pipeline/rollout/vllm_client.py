"""What is said to a vLLM server over HTTP: continue tokens, take weights, drop what was computed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import requests

from pipeline.model.policy import Policy
from pipeline.rollout.engine import Sampling
from pipeline.rollout.vllm_server import MODEL, ServerAway, VllmServer, own_server, session, wait_until_ready
from pipeline.rollout.vllm_weights import write_weights
from pipeline.settings.engine import VllmSection
from pipeline.workspace.addresses import redacted, shown
from pipeline.workspace.errors import UserError, line_of

NEEDED = (
    "/inference/v1/generate",
    "/pause",
    "/resume",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/update_weight_version",
)
"""Of vLLM's interface; all but the first are there with VLLM_SERVER_DEV_MODE=1 only."""
OLDEST = "0.32"
"""Version of vLLM that has all of them, and that says which weights have sampled a token."""
CONNECT_SECONDS = 10.0
UPDATING = "updating"
"""What weights are called that are on their way."""


@dataclass(frozen=True)
class Completion:
    """What a server has sampled."""

    ids: list[int]
    logprob: list[float]
    """Of the distribution that they were drawn from."""
    names: frozenset[str]
    """Of the weights that have sampled them."""
    reused: int
    """Tokens of the prefix that were not computed again."""


class VllmClient:
    """Talks to one server: the one at the section's ``url``, or one of this process's own, which is started when it is needed.

    Every call raises ``ServerAway`` where the server is, and a UserError where it refuses what it is asked.
    """

    def __init__(self, section: VllmSection, options: Sequence[str], threads: int, at_once: int) -> None:
        self.section, self._options, self._threads = section, options, threads
        self.server: VllmServer | None = None
        """Of this process's own, once it is needed."""
        self._url = section.url or ""
        self._looked_at = ""
        self._session = session(at_once)
        self._folder = Path(section.weights).absolute() / f"sent-{os.getpid()}-{secrets.token_hex(4)}"
        Finalize(self, shutil.rmtree, (self._folder, True), exitpriority=5)

    def connect(self, policy: Policy) -> None:
        """Wait until a server is there that serves a model like the policy, and that has what is asked of it.

        Raises:
            UserError: there is none, it is not there in time, or it is another one.
        """
        if self.section.url is None:
            shape, write = policy.model.config.to_json_string(), partial(write_weights, policy)
            self.server = own_server(self.section, shape, write, self._options, self._threads)
            self._url = self.server.url
        wait_until_ready(self._url, self.section.patience_seconds, self.server)
        if self._looked_at != self._url:
            self._require_interface()
            self._looked_at = self._url

    def complete(self, ids: Sequence[int], most: int, sampling: Sampling, ends: Sequence[int]) -> Completion:
        """Sample at most so many tokens; ``ends`` are those that end a response."""
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        asked = {
            "temperature": sampling.temperature,
            "max_tokens": most,
            "logprobs": 0,  # the sampled token's alone
            "stop": [sampling.stop],
            "include_stop_str_in_output": True,
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # what the model's files call so: ``ends`` says all of them
            "skip_special_tokens": False,
        }
        body = {"model": MODEL, "token_ids": [int(i) for i in ids], "sampling_params": plain | asked}
        found = self._post("/inference/v1/generate", body, self.section.patience_seconds).json()
        choice, usage = found["choices"][0], found.get("usage") or {}
        if choice["finish_reason"] not in ("stop", "length") or not choice["token_ids"]:
            raise ServerAway(f"a request has ended as {choice['finish_reason']}")
        return Completion(
            ids=choice["token_ids"],
            logprob=[token["logprob"] for token in choice["logprobs"]["content"]],
            names=frozenset(span["version"] for span in choice["weight_versions"] or ()),
            reused=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        )

    def update(self, policy: Policy, name: str) -> None:
        """Have the server sample from a policy's weights, and call them so.

        What it has computed with those before is dropped when they have been replaced. They get their name last: weights
        that did not arrive never have it.
        """
        folder = self._folder / name
        write_weights(policy, folder)
        self._post("/pause?mode=wait&clear_cache=false", {}, self.section.patience_seconds)
        try:
            self._post("/update_weight_version", {"new_version": UPDATING})
            self._reload(folder)
            self.reset_prefix_cache()
            self._post("/update_weight_version", {"new_version": name})
        finally:
            self._post("/resume", {})
        for earlier in self._folder.iterdir():
            if earlier != folder:
                shutil.rmtree(earlier)

    def _reload(self, folder: Path) -> None:
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        response = self._send("/collective_rpc", asked, self.section.patience_seconds)
        if not response.ok:
            raise UserError(
                f"rollout.engine: vLLM at {shown(self._url)} cannot take the policy's weights: {_said(response)}"
            )

    def reset_prefix_cache(self) -> None:
        """Drop keys and values of everything."""
        if not self._post("/reset_prefix_cache", {}).json()["success"]:
            raise ServerAway("it has not dropped what it had computed")

    def abort(self) -> None:
        """End all requests."""
        self._post("/abort_requests", {})

    def given_up(self, why: Exception) -> UserError:
        """What is said when a server has gone away too often."""
        return UserError(
            f"rollout.engine: vLLM at {shown(self._url)} has gone away again and again: {why}; what is finished is kept, and the "
            "same command goes on from there"
        )

    def _require_interface(self) -> None:
        missing = [
            path for path in NEEDED if self._get(path).status_code == 404
        ]  # 405 where there is something to post to
        if missing:
            version = self._get("/version").json().get("version", "of an unknown version")
            raise UserError(
                f"rollout.engine: vLLM {version} at {shown(self._url)} lacks {', '.join(missing)}; needed is vLLM {OLDEST} or "
                "later, started with VLLM_SERVER_DEV_MODE=1"
            )
        served = [model["id"] for model in self._get("/v1/models").json()["data"]]
        if MODEL not in served:
            raise UserError(
                f"rollout.engine: vLLM at {shown(self._url)} serves {', '.join(served)}; allowed: --served-model-name {MODEL}"
            )

    def _get(self, path: str) -> requests.Response:
        try:
            return self._session.get(self._url + path, timeout=CONNECT_SECONDS)
        except requests.RequestException as error:
            raise ServerAway(line_of(error, self._url)) from None

    def _post(self, path: str, body: dict[str, Any], seconds: float = 60.0) -> requests.Response:
        response = self._send(path, body, seconds)
        if response.status_code >= 500:
            raise ServerAway(_said(response))
        if not response.ok:
            raise UserError(f"rollout.engine: vLLM at {shown(self._url)} refuses {path}: {_said(response)}")
        return response

    def _send(self, path: str, body: dict[str, Any], seconds: float) -> requests.Response:
        try:
            return self._session.post(self._url + path, json=body, timeout=(CONNECT_SECONDS, seconds))
        except requests.RequestException as error:
            raise ServerAway(line_of(error, self._url)) from None


def _said(response: requests.Response) -> str:
    """A server's own words, on one line."""
    return redacted(" ".join(response.text.split()))[:300]
