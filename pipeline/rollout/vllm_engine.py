"""The engine that asks a vLLM server: token ids go out, token ids and their log-probabilities come back.

Requests are in flight together, one per episode, each in a thread that waits for its answer; ``follow`` is called in the
caller's thread, one answer after another. vLLM keeps the keys and values of what it has seen, so that a longer prefix is
computed from where an earlier one ended.

Every change of the weights gives them a new name. vLLM says of each token under which name it was sampled, so that a
server that was started again, or that another process has sent weights to, is noticed with its first answer.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np

from pipeline.model.policy import Policy
from pipeline.progress.display import beat, due
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.vllm_client import VllmClient
from pipeline.rollout.vllm_server import ServerAway
from pipeline.workspace.errors import UserError
from pipeline.workspace.finite import require_finite

UNKNOWN = float("nan")
"""The entropy of a distribution of which only the sampled token's log-probability is told."""
MOST_RETRIES = 3
"""How often a server may go away during one call of ``generate``."""


class VllmEngine:
    """See ``RolloutEngine``. Draws are vLLM's own: of a request's uniforms only the number counts.

    Entropies of continuations are NaN; they are computed where log-probabilities are computed again.

    Raises:
        UserError: vLLM is not installed, or the server is not there, or not one that can be used.
    """

    def __init__(self, policy: Policy, client: VllmClient, slots: int) -> None:
        self.policy, self.client, self.slots, self.policy_version = policy, client, slots, 0
        self.positions_computed = 0
        """Tokens that have passed through the model since everything was dropped."""
        self._own, self._sent = secrets.token_hex(4), 0
        self._name = ""
        """Of the weights that the server has, by this engine; empty: none."""

    def sync(self, policy: Policy, version: int) -> None:
        """See ``RolloutEngine.sync``. Adapters are merged, and the weights rounded to the engine's own precision."""
        if policy is not self.policy:
            self.policy.follow(policy)
        self._send(version)
        self.policy_version = version

    def forget(self) -> None:
        """See ``RolloutEngine.forget``."""
        self.positions_computed = 0
        if self._name:
            self._again(self.client.reset_prefix_cache)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        """See ``RolloutEngine.generate``.

        Raises:
            UserError: the server is away, and not back in time; or it refuses a request.
        """
        if not self._name:
            self._send(self.policy_version)
        with ThreadPoolExecutor(self.slots, "vllm") as threads:
            call = _Call(self, threads, sampling)
            try:
                return call.converse(enumerate(requests), follow)
            except BaseException:
                call.abandon()
                raise

    def answer(self, request: Request, sampling: Sampling) -> tuple[Continuation, int]:
        """Ask once, and wait; returns how many tokens have passed through the model, too.

        Raises:
            ServerAway: the server is; or it has other weights than this engine's.
        """
        ids, logprob, computed, finish = list[int](), list[float](), 0, ""
        while not finish:
            prefix, left = [*request.ids, *ids], len(request.uniforms) - len(ids)
            choice = self.client.complete(prefix, left, sampling, sorted(self.policy.ends))
            if choice.names != {self._name}:
                raise ServerAway(
                    f"it samples from weights that are called {', '.join(sorted(choice.names))}, not {self._name}"
                )
            ids, logprob = ids + choice.ids, logprob + choice.logprob
            computed += len(prefix) - choice.reused + len(choice.ids) - 1  # the last one has not passed
            count, finish = self._ended(request, ids, sampling.stop)
        begin = len(request.ids)
        require_finite(
            "a log-probability of vLLM's",
            np.array(logprob),
            lambda i: f"token {begin + i} of episode {request.episode}",
        )
        unknown = [UNKNOWN] * count
        return Continuation(ids[:count], logprob[:count], unknown, finish, self.policy_version), computed

    def recover(self) -> None:
        """Wait until the server is back, or start it again, and send it the weights.

        Raises:
            UserError: it is not back in time.
        """
        self._name = ""
        self._send(self.policy_version)

    def _send(self, version: int) -> None:
        """Give the server the policy's weights, under a new name.

        Raises:
            UserError: it is away and not back in time, or cannot take them.
        """
        self._name, self._sent = "", self._sent + 1
        name = f"{self._own}-{self._sent}-{version}"
        self._again(lambda: self.client.update(self.policy, name))
        self._name = name

    def _again(self, step: Callable[[], None]) -> None:
        """Do what needs a server; where it is away, wait until it is there and do it again."""
        for left in reversed(range(MOST_RETRIES)):
            try:
                self.client.connect(self.policy)
                return step()
            except ServerAway as error:
                if not left:
                    raise self.client.given_up(error) from None

    def _ended(self, request: Request, ids: list[int], stop: str) -> tuple[int, str]:
        """How many tokens there are up to the one that completes the stop text, forced tokens included, and how they ended;
        with no word for that where they have not.

        vLLM looks for the text in what it has sampled alone, and in the end of a prefix that is in the middle of a
        character. So what was sampled behind a text that a forced token begins is dropped, and what has ended too early
        is continued.
        """
        forced = list(request.ids)[len(request.ids) - request.forced :]
        decode = self.policy.tokenizer.backend_tokenizer.decode

        def complete(count: int) -> bool:
            return stop in decode([*forced, *ids[:count]], skip_special_tokens=False)

        count = len(ids)
        if complete(count):
            while count > 1 and complete(count - 1):
                count -= 1
            return count, "stop"
        if ids[-1] in self.policy.ends:
            return count, "eos"
        return count, "length" if count == len(request.uniforms) else ""


class _Call:
    """One call of ``generate``."""

    def __init__(self, engine: VllmEngine, threads: ThreadPoolExecutor, sampling: Sampling) -> None:
        self.engine, self.threads, self.sampling = engine, threads, sampling
        self.ready: deque[tuple[int, Request]] = deque()
        """To be asked next: of episodes that have begun."""
        self.asked: dict[Future[tuple[Continuation, int]], tuple[int, Request]] = {}
        self.last: dict[int, Continuation] = {}

    def converse(self, waiting: Iterator[tuple[int, Request]], follow: Follow | None) -> list[Continuation]:
        """Ask until nothing is left to ask."""
        retries = 0
        while self._ask(waiting):
            lost = self._take(FIRST_COMPLETED, follow)
            if lost is None:
                continue
            retries += 1
            if retries > MOST_RETRIES:
                raise self.engine.client.given_up(lost)
            while self.asked:  # what is in flight is complete, or lost, too
                self._take(ALL_COMPLETED, follow)
            self.engine.recover()
        return [self.last[number] for number in sorted(self.last)]

    def _ask(self, waiting: Iterator[tuple[int, Request]]) -> bool:
        """Have as many requests in flight as there are slots; returns whether there is any."""
        while len(self.asked) < self.engine.slots:
            following = self.ready.popleft() if self.ready else next(waiting, None)
            if following is None:
                break
            self.asked[self.threads.submit(self.engine.answer, following[1], self.sampling)] = following
        return bool(self.asked)

    def _take(self, when: str, follow: Follow | None) -> ServerAway | None:
        """Wait, and go on from what is complete; returns how the server has gone away, if it has."""
        done, _ = wait(self.asked, timeout=1.0, return_when=when)
        lost: ServerAway | None = None
        for future in sorted(done, key=lambda one: self.asked[one][0]):
            number, request = self.asked.pop(future)
            try:
                answer, computed = future.result()
            except ServerAway as error:
                lost = error
                self.ready.append((number, request))
                continue
            self.last[number] = answer
            self.engine.positions_computed += computed
            further = None if follow is None else follow(number, answer)
            if further is not None:
                self.ready.append((number, further))
        if due():
            beat(0)
        return lost

    def abandon(self) -> None:
        """End what is in flight: somebody has raised."""
        with suppress(ServerAway, UserError):
            self.engine.client.abort()
