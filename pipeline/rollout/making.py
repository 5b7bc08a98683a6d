"""Which engine samples: the one place where one is made."""

from pipeline.model.memory import allowance
from pipeline.model.policy import Policy
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.transformers_engine import Bound, TransformersEngine
from pipeline.settings.params import Config


def make_engine(config: Config, policy: Policy, slots: int | None = None) -> RolloutEngine:
    """An engine that samples a policy's responses, ``rollout.batch_episodes`` at once or as many as ``slots`` says, or
    as many as fit into ``rollout.cache_gigabytes``.

    ``sync`` must be called whenever the policy's weights have changed; it may be given another policy of the same shape, which
    is then sampled from in this one's precision.

    Raises:
        UserError: not a single episode fits.
    """
    gigabytes = config.rollout.cache_gigabytes or allowance(config, policy.device) / 1e9
    bound = Bound(gigabytes, max(section.context_tokens for section in config.environments.values()))
    return TransformersEngine(policy, slots or config.rollout.batch_episodes, bound=bound)
