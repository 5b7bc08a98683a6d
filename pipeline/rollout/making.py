"""Which engine samples: the one place where one is made."""

from pipeline.model.policy import Policy
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config


def make_engine(config: Config, policy: Policy, slots: int | None = None) -> RolloutEngine:
    """An engine that samples a policy's responses.

    Args:
        config: params.yaml.
        policy: what samples; ``forget`` must be called whenever its weights have changed.
        slots: episodes at once; None: ``rollout.batch_episodes``.
    """
    return TransformersEngine(policy, slots or config.rollout.batch_episodes)
