"""What samples: the model in this process, or vLLM, in a server of its own."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.section import Address, Positive, Section

AnyPath = Annotated[str, Field(min_length=1, max_length=400)]
"""Path of a file or folder, from the root or absolute."""


class TransformersSection(Section):
    """The trained model samples itself, with the pipeline's own cache. What is drawn is named: equal params, equal bytes."""

    kind: Literal["transformers"] = "transformers"


class VllmSection(Section):
    """vLLM samples, with random numbers of its own: tokens differ from run to run, all else is named as ever."""

    kind: Literal["vllm"]
    url: Address | None = None
    """Address of a server that runs already, http://host:port; null: each process that samples starts its own and ends it.
    A key that it asks for is read from VLLM_API_KEY."""
    python: AnyPath = ".venv-vllm/bin/python"
    """Interpreter with vLLM, of a server that is started here (``make install-vllm``)."""
    arguments: list[str] = Field(default=[])
    """More arguments of such a server, e.g. ``["--tensor-parallel-size=2"]``."""
    weights: AnyPath = ".cache/vllm"
    """Folder in which weights are handed over; the server must see it under the same path."""
    patience_seconds: Positive = 600.0
    """How long to wait for a server that starts, or that has gone away, before the stage stops."""

    def check(self) -> None:
        if self.url is not None:
            self.refuse_ignored("url names a server that runs already", "python", "arguments")
