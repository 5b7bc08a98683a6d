"""Make or load the reference policy: models/policy, a Hugging Face directory."""

from pipeline.commands.cli import ParamsFile, configured, next_command, run


def main(params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params)
    import torch

    from pipeline.bootstrap.demonstrations import expert_of
    from pipeline.bootstrap.supervision import bootstrap
    from pipeline.environments import make
    from pipeline.environments.playing import reset
    from pipeline.model.loading import load_policy, longest_context
    from pipeline.progress.display import Display, doing
    from pipeline.rollout.acceptance import accept
    from pipeline.workspace.errors import UserError

    torch.set_num_threads(config.workers)
    settings = config.policy
    for section in config.environments.values():
        environment = make(section)
        reset(environment, 0, 0)
        if settings.kind == "scratch":
            expert_of(environment, settings.demonstrations.reasoning)
    if settings.kind == "pretrained":
        doing(f"loading {settings.model}")
        policy = load_policy(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            context=longest_context(config),
        )
    else:
        with Display("policy", ["supervising"]) as display:
            report = display.report("supervising")
            policy = bootstrap(
                settings, config.environments, lambda step, total, loss: report(step, total, f"loss {loss:.3f}")
            )
        doing("saving")
    longest = getattr(policy.model.config, "max_position_embeddings", None)
    for name, section in config.environments.items():
        if longest is not None and section.context_tokens > longest:
            raise UserError(
                f"{params}: environments.{name}.context_tokens: {section.context_tokens} is more than the "
                f"model's {longest} positions"
            )
    if settings.kind == "pretrained":
        accept(policy, settings.model, config)
    policy.save(layout.policy)
    size = sum(p.numel() for p in policy.model.parameters())
    following = next_command(params, "python -m stages.rollout", environment=next(iter(config.environments)))
    return f"{layout.policy}: {size / 1e6:.2f} M parameters, {len(policy.tokenizer)} tokens. {following}"


if __name__ == "__main__":
    run(main)
