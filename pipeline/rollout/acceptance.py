"""Whether a policy can do what every later stage asks of it: talk over turns, and be scored as it was sampled."""

from textwrap import shorten

import numpy as np
import torch

from pipeline.model.checks import rounding
from pipeline.model.policy import Policy
from pipeline.rollout.engine import Continuation, Request, Sampling
from pipeline.rollout.making import transformers_engine
from pipeline.settings.params import Config
from pipeline.trajectories.parsing import END_OF_RESPONSE
from pipeline.trajectories.prompting import Dialogue
from pipeline.workspace.errors import UserError
from pipeline.workspace.randomness import generator

EPISODES, PROMPT, SAMPLED, OBSERVED = 3, 9, 5, 4
"""Of the trial: more episodes than slots, and how many tokens each part has."""


def accept(policy: Policy, source: str, config: Config) -> None:
    """Try a policy out.

    Episodes of two turns are sampled over the engine's cache; transformers' own forward must give their tokens the same
    log-probabilities. Every environment's dialogue is begun. In errors the policy is called ``source``.

    Raises:
        UserError: it fails, its chat template cannot lead a dialogue, or no episode fits into ``rollout.cache_gigabytes``.
    """
    for section in config.environments.values():
        Dialogue(policy.tokenizer, section.layout, config.rollout.prefill, section.response_tokens)
    try:
        worst = _worst_difference(policy, config)
    except UserError:
        raise
    except Exception as error:  # of any kind, as in ``load_policy``
        reason = shorten(str(error) or type(error).__name__, 160, placeholder=" …")
        raise UserError(f"policy: {source!r} cannot be sampled from: {reason}") from None
    if not worst <= 1:
        raise UserError(
            f"policy: {source!r} gives tokens other log-probabilities over the engine's cache than by transformers alone"
        )


def _worst_difference(policy: Policy, config: Config) -> float:
    """Between log-probabilities sampled with and computed anew, in units of what rounding explains."""
    draws = generator(0, "acceptance")
    texts = draws.integers(len(policy.tokenizer), size=(EPISODES, PROMPT + OBSERVED))
    texts[1, : PROMPT - 1] = texts[0, : PROMPT - 1]  # so that one begins with what another has computed
    ids = [list(text[:PROMPT]) for text in texts]
    answers: list[list[Continuation]] = [[] for _ in texts]
    starts: list[list[int]] = [[] for _ in texts]

    def request(number: int) -> Request:
        starts[number].append(len(ids[number]))
        return Request(list(ids[number]), draws.random(SAMPLED))

    def follow(number: int, answer: Continuation) -> Request | None:
        ids[number] += answer.ids
        answers[number].append(answer)
        if len(answers[number]) == 2:
            return None
        ids[number] += list(texts[number, PROMPT:])
        return request(number)

    engine = transformers_engine(config, policy, EPISODES - 1)
    engine.generate((request(number) for number in range(EPISODES)), Sampling(1.0, END_OF_RESPONSE), follow)
    found = [_difference(policy, *episode) for episode in zip(ids, starts, answers, strict=True)]
    return float(np.max(found))  # NaN, if one of them is


@torch.inference_mode()
def _difference(policy: Policy, ids: list[int], starts: list[int], answers: list[Continuation]) -> float:
    tokens = torch.tensor(ids, device=policy.device)
    logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0].float()
    expected = logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0].cpu().numpy()
    given = [answer.logprob for answer in answers]
    scored = [expected[start - 1 :][: len(part)] for start, part in zip(starts, given, strict=True)]
    far = float(np.abs(np.concatenate(given) - np.concatenate(scored)).max())
    return far / (2 * rounding(policy.model.dtype) * float(logits.abs().max()))
