"""Which engine samples: the one place where one is made."""

from pipeline.model.policy import Policy
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config


def make_engine(config: Config, policy: Policy, slots: int | None = None) -> RolloutEngine:
    """An engine that samples a policy's responses, ``rollout.batch_episodes`` at once or as many as ``slots`` says.

    ``forget`` must be called whenever the policy's weights have changed.
    """
    return TransformersEngine(policy, slots or config.rollout.batch_episodes)
