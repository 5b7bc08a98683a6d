"""One forward pass of the reference policy over what was sampled."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.model.loading import load_trained
from pipeline.model.memory import tokens_per_forward
from pipeline.model.policy import Policy
from pipeline.model.scoring import TokenScores, batches_of, predicting_hidden, score_tokens
from pipeline.model.shards import gathered
from pipeline.progress.display import due, span, within
from pipeline.settings.params import Config
from pipeline.trajectories.table import kept
from pipeline.trajectories.trajectory import Trajectories, concatenate, require_known_ids
from pipeline.workspace.finite import require_finite
from pipeline.workspace.processes import Tell


@torch.inference_mode()
def score_trajectories(
    policy: Policy, trajectories: Trajectories, temperature: float, tokens_per_forward: int
) -> list[np.ndarray]:
    """Log-probability, entropy and log-partition of every sampled token.

    Returns:
        Three float32 arrays (N,), 0 where not sampled.

    Raises:
        NumericsError: one of these numbers is not finite.
        TrajectoryError: a token is none of the policy's.
    """
    require_known_ids(trajectories, policy.model.get_input_embeddings().weight.shape[0])
    result = [np.zeros(len(trajectories.input_ids), dtype=np.float32) for _ in TokenScores._fields]
    sequences, done = trajectories.sequences, 0
    for batch in batches_of(policy, sequences, tokens_per_forward):
        spans = [trajectories.tokens(e) for e in batch]
        wanted = [trajectories.sampled[span] for span in spans]
        flat = np.concatenate([np.arange(s.start, s.stop)[w] for s, w in zip(spans, wanted, strict=True)])
        tokens = torch.from_numpy(trajectories.input_ids[flat].astype(np.int64)).to(policy.device)
        own = [sequences[e] for e in batch]
        scores = gathered(policy.model, _score, policy, own, wanted, tokens, temperature)
        for values, scored in zip(result, scores, strict=True):
            values[flat] = scored.float().cpu().numpy()
        done += len(batch)
        if due():
            within(done / len(trajectories), f"{done} of {len(trajectories)} episodes")
    for name, values in zip(TokenScores._fields, result, strict=True):
        require_finite(f"{name} of a token under the policy that scores it", values, trajectories.place)
    return result


def _score(
    policy: Policy, sequences: list[np.ndarray], wanted: list[np.ndarray], tokens: Tensor, temperature: float
) -> TokenScores:
    return score_tokens(predicting_hidden(policy, sequences, wanted), tokens, policy.head, temperature, policy.cap)


def annotate(
    trajectories: Trajectories, reference: Policy, temperature: float, tokens_per_forward: int
) -> Trajectories:
    """Add the reference policy's energy, log-probability and entropy to trajectories.

    Energy is ``-logsumexp`` of the raw float32 logits that predict a token (arXiv 2605.14558): low where the reference
    policy is confident, whatever was sampled there; no temperature enters. Log-probability and entropy are at the
    temperature of sampling; a forward pass computes ``tokens_per_forward`` tokens at most.
    """
    logprob, entropy, logsumexp = score_trajectories(reference, trajectories, temperature, tokens_per_forward)
    return replace(trajectories, energy=-logsumexp, ref_logprob=logprob, ref_entropy=entropy)


def with_entropies(trajectories: Trajectories, entropy: np.ndarray) -> Trajectories:
    """The same, with entropies, float32 (N,), in place of those that an engine could not tell, which are NaN."""
    return replace(trajectories, entropy=np.where(np.isnan(trajectories.entropy), entropy, trajectories.entropy))


def annotate_own(
    trajectories: Trajectories, reference: Policy, temperature: float, tokens_per_forward: int
) -> Trajectories:
    """Annotate episodes that the reference policy itself has sampled."""
    annotated = annotate(trajectories, reference, temperature, tokens_per_forward)
    assert annotated.ref_entropy is not None
    return with_entropies(annotated, annotated.ref_entropy)


def annotate_part(task: tuple[Config, Path, Trajectories, Path], report: Tell) -> Trajectories:
    """Annotate some slices in a process of its own; ``task`` is config, reference policy's directory, episodes, and the
    folder of the slices that are finished: one that is there is not annotated again.

    Slice by slice, because float rounding depends on what shares a forward pass: a slice's numbers are to be exactly
    those of a training that samples and annotates it itself.
    """
    config, directory, part, cache = task
    report(0, len(part), "loading the policy")
    reference, size, annotated = load_trained(directory, config), config.rollout.groups * config.rollout.group_size, []
    most = tokens_per_forward(config, reference)
    for done in range(0, len(part), size):
        report(done, len(part), "episodes")
        piece = part.select(range(done, min(done + size, len(part))))
        with span("", 0, len(piece)):
            file = cache / f"{piece.episodes['seed'][0]}.parquet"
            annotated.append(kept(file, partial(annotate_own, piece, reference, config.rollout.temperature, most)))
    return concatenate(annotated)
