"""A policy as vLLM loads it: a plain model directory whose output head has weights of its own."""

from pathlib import Path

from safetensors.torch import save_file

from pipeline.model.adapters import merged
from pipeline.model.policy import Policy
from pipeline.workspace.files import read_json, replacing, write_json
from pipeline.workspace.manifest import write_manifest

HEAD_FILE = "model-head.safetensors"


def write_weights(policy: Policy, directory: Path) -> None:
    """Write configuration, tokenizer and weights, in the precision of the policy's; adapters are merged first.

    A head that is tied to the embedding is written beside it, and the configuration says that the two are apart: vLLM
    arranges a head's weights once more for its kernels, and leaves them as they were where only the embedding is loaded.
    """
    plain = merged(policy)
    model = plain.model.to(policy.model.dtype) if plain is not policy else plain.model
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with replacing(directory) as partial:
        model.save_pretrained(partial, max_shard_size="1000GB")  # with a list of its files, no other one would be read
        policy.tokenizer.save_pretrained(partial)
        if tied:
            weight = model.get_output_embeddings().weight.detach().cpu().clone()
            save_file({f"{head}.weight": weight}, partial / HEAD_FILE, {"format": "pt"})
        config = partial / "config.json"
        write_json(config, read_json(config) | {"tie_word_embeddings": False})
        write_manifest(partial)
