"""Make or load the reference policy: models/policy, a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.cli import ParamsFile, configured, make_alone, next_command, run

if TYPE_CHECKING:
    from pipeline.model.policy import Policy
    from pipeline.settings.params import Config


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params)
    import torch

    from pipeline.bootstrap.demonstrations import expert_of
    from pipeline.bootstrap.scratch import bootstrap
    from pipeline.bootstrap.supervision import supervision_alarm
    from pipeline.bootstrap.warm_start import warm_start
    from pipeline.environments import make
    from pipeline.environments.playing import reset
    from pipeline.model.adapters import merged
    from pipeline.model.loading import load_policy, longest_context
    from pipeline.progress.display import doing
    from pipeline.rollout.acceptance import accept
    from pipeline.workspace.errors import UserError

    torch.set_num_threads(config.workers * config.threads)
    settings, plan = config.policy, config.policy.demonstrations
    for section in config.environments.values():
        environment = make(section)
        reset(environment, 0, 0)
        if plan is not None:
            expert_of(environment, plan.reasoning)

    losses: list[float] = []
    checkpoint = None if plan is None else _checkpoint(config)
    if settings.kind == "pretrained":
        doing(f"loading {settings.model}")
        policy = load_policy(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype if plan is None else "float32",
            trust_remote_code=settings.trust_remote_code,
            gguf_file=settings.gguf_file,
            context=longest_context(config),
        )
    else:
        make_alone(layout, "policy", checkpoint)
        policy = _supervised(partial(bootstrap, settings, config.environments), losses, checkpoint)
    longest = getattr(policy.model.config, "max_position_embeddings", None)
    for name, section in config.environments.items():
        if longest is not None and section.context_tokens > longest:
            raise UserError(
                f"{params}: environments.{name}.context_tokens: {section.context_tokens} is more than the "
                f"model's {longest} positions"
            )
    if settings.kind == "pretrained":
        accept(policy, settings.model, config)
        policy = merged(policy)
        if settings.demonstrations is not None:
            make_alone(layout, "policy", checkpoint)
            policy = _supervised(partial(warm_start, policy, settings.demonstrations, config), losses, checkpoint)
        policy.model.to(getattr(torch, settings.dtype))
    alarm = supervision_alarm(losses, len(policy.tokenizer)) if losses else ""
    note = "" if policy.tokenizer.chat_template else "It has no chat template: messages are lines like `user: …`. "
    doing("saving")
    make_alone(layout, "policy")
    policy.save(layout.policy)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    size = sum(p.numel() for p in policy.model.parameters())
    following = next_command(params, "python -m stages.rollout", environment=next(iter(config.environments)))
    return f"{layout.policy}: {size / 1e6:.2f} M parameters, {len(policy.tokenizer)} tokens. {alarm}{note}{following}"


def _supervised(begin: Callable[..., Policy], losses: list[float], checkpoint: Path | None) -> Policy:
    """What a supervision makes, which keeps in a file how far it is; notes the loss of every step."""
    from pipeline.progress.display import Display

    with Display("policy", ["supervising"]) as display:
        report = display.report("supervising")

        def told(step: int, total: int, loss: float) -> None:
            losses.append(loss)
            report(step, total, f"loss {loss:.3f}")

        return begin(told, checkpoint=checkpoint)


def _checkpoint(config: Config) -> Path:
    """Where it is kept how far the supervision is, named by all that decides it."""
    import torch

    from pipeline.model.memory import total_memory
    from pipeline.sources.code import result_key
    from pipeline.sources.fingerprints import of_environment, of_policy
    from pipeline.workspace.layout import Cache

    settings = config.model_dump(mode="json", include={"policy", "environments", "workers", "threads"})
    settings["forward"] = config.rollout.prefill, config.train.tokens_per_forward
    if config.train.tokens_per_forward == "auto":
        settings["memory"] = round(total_memory(torch.device("cpu")) / 2**30)
    named = [*map(of_environment, config.environments.values()), of_policy(config.policy)]
    way = "scratch" if config.policy.kind == "scratch" else "warm_start"
    return Cache().supervision(result_key(f"pipeline.bootstrap.{way}", settings | {"sources": named}))


if __name__ == "__main__":
    run(main)
