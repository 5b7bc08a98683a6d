"""What a training does with an engine that tells the sampled token's log-probability alone, as vLLM does.

Our own engine samples here, so that everything else is what it is with entropies told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from pipeline.energy.annotate import annotate_own
from pipeline.model.policy import Policy
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.training.module import PolicyGradient
from tests.test_branching import branching_config, collection_of, rounds_of
from tests.trainings import LAKE, configured, fit, standing, unmoved


class Untold(TransformersEngine):
    """Keeps entropies to itself."""

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        def blank(answer: Continuation) -> Continuation:
            return replace(answer, entropy=[float("nan")] * len(answer.ids))

        further = None if follow is None else lambda number, answer: follow(number, blank(answer))
        return list(map(blank, super().generate(requests, sampling, further)))


def begun(policy: Policy) -> tuple[PolicyGradient, PolicyGradient]:
    """A training whose engine tells entropies, and one whose engine does not."""
    told, untold = (
        PolicyGradient(configured({"rollout": {"engine": {"kind": kind}}}), LAKE, "grpo", 0, policy)
        for kind in ("transformers", "vllm")
    )
    untold.engine = Untold(policy)
    untold.collection = replace(untold.collection, engine=untold.engine)
    return standing(told), standing(untold)


def test_entropies_that_were_not_told_are_those_of_the_policy(policy: Policy) -> None:
    told, untold = map(unmoved, begun(policy))
    np.testing.assert_array_equal(told.episodes.input_ids, untold.episodes.input_ids)
    np.testing.assert_array_equal(told.episodes.logprob, untold.episodes.logprob)
    np.testing.assert_allclose(told.episodes.entropy, untold.episodes.entropy, atol=1e-4)
    for name in ("entropy", "entropy_reasoning"):
        assert untold.metrics[name] == pytest.approx(told.metrics[name], abs=1e-4)
    assert 0 < untold.metrics["sampler_difference"] < 1e-4
    assert "sampler_difference" not in told.metrics


def test_a_training_goes_on_without_them(policy: Policy) -> None:
    _, module = begun(policy)
    del module.optimizers
    fit(module, 2)
    assert all(np.isfinite(value) for row in module.curve for value in row.values())
    assert module.last_episodes is not None
    assert not np.isnan(module.last_episodes.entropy).any()


@pytest.mark.parametrize("method", ["arpo", "switch", "appo"])
def test_trees_that_grow_by_entropies_grow_as_if_they_had_been_told(policy: Policy, method: str) -> None:
    changed = branching_config()
    told = collection_of(policy, method, changed)
    untold = replace(told, engine=Untold(policy, changed.rollout.batch_episodes))
    for one, other in zip(rounds_of(told, 1), rounds_of(untold, 1), strict=True):
        assert one.episodes["parent"] == other.episodes["parent"]
        assert one.episodes["split"] == other.episodes["split"]
        assert one.episodes["temperature"] == other.episodes["temperature"]
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-4)


def test_the_table_of_the_reference_policy_has_them_when_it_is_annotated(policy: Policy) -> None:
    collection = collection_of(policy, "grpo", branching_config())
    (waves,) = collection.collect(0)
    blank = replace(waves[0], entropy=np.where(waves[0].sampled, np.float32("nan"), np.float32(0)))
    np.testing.assert_allclose(annotate_own(blank, policy, 1.0, 4096).entropy, waves[0].entropy, atol=1e-4)
