"""Which engine samples: the one place where one is made."""

from pipeline.model.memory import allowance
from pipeline.model.policy import Policy
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.transformers_engine import Bound, TransformersEngine
from pipeline.rollout.vllm_client import VllmClient
from pipeline.rollout.vllm_engine import VllmEngine
from pipeline.settings.engine import VllmSection
from pipeline.settings.params import Config


def make_engine(config: Config, policy: Policy, slots: int | None = None) -> RolloutEngine:
    """An engine that samples a policy's responses, ``rollout.batch_episodes`` at once or as many as ``slots`` says, or
    as many as fit into ``rollout.cache_gigabytes``.

    ``sync`` must be called whenever the policy's weights have changed; it may be given another policy of the same shape, which
    is then sampled from in this one's precision.

    Raises:
        UserError: not a single episode fits, or ``rollout.engine`` cannot be used.
    """
    section = config.rollout.engine
    if section.kind == "vllm":
        return vllm_engine(config, section, policy, slots or config.rollout.batch_episodes)
    return transformers_engine(config, policy, slots)


def transformers_engine(config: Config, policy: Policy, slots: int | None = None) -> TransformersEngine:
    """See ``make_engine``; whatever ``rollout.engine`` says."""
    return TransformersEngine(policy, slots or config.rollout.batch_episodes, bound=_bound(config, policy))


def vllm_engine(config: Config, section: VllmSection, policy: Policy, slots: int) -> VllmEngine:
    """See ``make_engine``."""
    return VllmEngine(policy, VllmClient(section, vllm_options(config, policy, slots), config.threads, slots), slots)


def vllm_options(config: Config, policy: Policy, slots: int) -> list[str]:
    """Arguments of a vLLM server, beside those that any has (see ``vllm_server``)."""
    gigabytes, context = _bound(config, policy)
    return [
        *("--dtype", str(policy.model.dtype).removeprefix("torch.")),
        *("--max-model-len", str(context), "--max-num-seqs", str(slots)),
        *("--kv-cache-memory-bytes", str(int(gigabytes * 1e9))),
        *(("--enforce-eager",) if policy.device.type == "cpu" else ()),  # compiling takes longer than what is sampled
    ]


def _bound(config: Config, policy: Policy) -> Bound:
    gigabytes = config.rollout.cache_gigabytes or allowance(config, policy.device) / 1e9
    return Bound(gigabytes, max(section.context_tokens for section in config.environments.values()))
