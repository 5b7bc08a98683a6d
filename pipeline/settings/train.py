"""How a training goes: its length, its minibatches, and what it is computed with."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.alarms import Alarms
from pipeline.settings.correction import Correction
from pipeline.settings.lora import Lora
from pipeline.settings.processes import Processes
from pipeline.settings.section import Count, Float, Int, Positive, Section

Decay = Annotated[Float, Field(ge=0.0, lt=1.0)]


class Train(Section):
    """The optimisation that all methods of a comparison share."""

    iterations: Count = 40
    """Collect, annotate, update: how many times, at most."""
    tokens: Annotated[Int, Field(ge=1, le=10**15)] | None = None
    """Sampled tokens after which a training ends, at the iteration that comes nearest; null: after ``iterations``."""
    passes: Count = 2
    """Passes over an iteration's episodes."""
    minibatch: Count = 32
    """Trajectories per optimizer step."""
    gradient_clip: Positive = 1.0
    """Largest norm of the gradient."""
    non_finite_updates: Count = 8
    """So many updates in a row whose loss or gradient is NaN or infinite end a training; a single one is left out."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's two decay rates."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate over the iterations, or over ``tokens`` where they are set; ``linear`` falls to zero."""
    tokens_per_forward: Count | Literal["auto"] = 4096
    """Padded tokens that pass through the model at once; bounds memory, gradients are accumulated exactly. ``auto``: as many
    as the machine's memory, or the device's, holds activations of for each of the ``workers`` (``pipeline/model/memory.py``)."""
    validate_every: Count = 10
    """Iterations between two validations; one is made before training too."""
    gradient_trajectories: Count = 4
    """Trajectories of such an iteration of which some tokens' gradients are measured one by one: a backward pass each, up to
    twenty a trajectory, which takes long with a large policy."""
    asynchronous: Annotated[Int, Field(ge=0, le=1)] = 0
    """1: while the policy is updated, ``rollout.workers`` play the next iteration's episodes with it as it was before."""
    lora: Lora | None = None
    """Adapters that are trained in place of the policy's weights; null: all weights are trained."""
    processes: Processes = Processes()
    """Processes that do one training together."""
    alarms: Alarms = Alarms()
    """When an iteration looks wrong, which is then said wherever the training is shown."""
    correction: Correction | None = None
    """Where the sampler's probabilities are not those that an update begins with: a factor on each token's surrogate; null:
    no factor."""
