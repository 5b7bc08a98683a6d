"""Run the vLLM server that rollout.engine.url names.

It begins with the reference policy, and takes the weights of the training that samples from it. Ends with Ctrl-C.
"""

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from pipeline.commands.cli import ParamsFile, configured


def main(
    params: ParamsFile = "params.yaml",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="On which it listens.")] = "127.0.0.1",
    python: Annotated[str, typer.Option(metavar="FILE", help="Interpreter with vLLM.")] = ".venv-vllm/bin/python",
) -> str:
    config, layout, _ = configured(params)
    from pipeline.model.loading import load_trained
    from pipeline.progress.display import doing
    from pipeline.rollout.making import vllm_options
    from pipeline.rollout.vllm_server import require_installed, server_command, server_environment
    from pipeline.rollout.vllm_weights import write_weights
    from pipeline.settings.engine import VllmSection
    from pipeline.workspace.errors import UserError

    section = config.rollout.engine
    if section.kind != "vllm" or section.url is None:
        raise UserError(f"{params}: rollout.engine: no server is named; allowed: {{kind: vllm, url: http://host:port}}")
    require_installed(VllmSection(kind="vllm", python=python))
    doing("loading the policy")
    policy = load_trained(layout.policy, config)
    folder = Path(section.weights) / "served"
    write_weights(policy, folder)
    port = urlsplit(section.url).port or 80
    options = vllm_options(config, policy, config.rollout.batch_episodes)
    command = server_command(python, host, port, folder, options)
    os.execve(command[0], command, server_environment(config.threads, "--enforce-eager" in options))
