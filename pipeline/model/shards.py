"""Weights of which several processes hold a part each (FSDP2): shared out once, and gathered for as long as they are used."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Result = TypeVar("Result")


def share_out(model: nn.Module, mesh: Any) -> None:
    """Leave each process of a mesh its part of a model's weights, in place: by layer, and of all that is in no layer.

    From here on the model computes inside ``gathered`` only. Its gradients are sums over the processes, not means.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes a second

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [*layers, model]:
        shared: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        shared.set_gradient_divide_factor(1.0)
        shared.set_force_sum_reduction_for_comms(True)  # gloo has no other
        shared.with_weights = MethodType(_call, shared)
        register_fsdp_forward_method(shared, "with_weights")


def gathered(module: Any, function: Callable[..., Result], *inputs: Any) -> Result:
    """What a function of a module's weights gives; of weights that are shared out, they are whole meanwhile.

    All processes must then call it equally often, in the same order. A backward pass from the result gathers them again; it
    finds its beginning in a tensor, or in tuples, lists and dictionaries of tensors. Of a model, the layers' own weights are
    gathered by further calls, layer by layer.
    """
    within = getattr(module, "with_weights", None)
    if within is None:
        return function(*inputs)
    if torch.is_inference_mode_enabled():  # what is gathered now is written to again, also where there are gradients
        with torch.inference_mode(False), torch.no_grad():
            result: Result = within(function, *inputs)
        return result
    result = within(function, *inputs)
    return result


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out: all processes must call it then."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, the same memory: all of it, if it is not shared out."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _call(module: nn.Module, function: Callable[..., Result], *inputs: Any) -> Result:
    return function(*inputs)
