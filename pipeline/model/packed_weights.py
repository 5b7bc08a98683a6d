"""Weights as oneDNN reads them: what sampling multiplies by.

A product of few rows reads every weight once and does little with it; a usual one also arranges the weights anew for the
processor's caches, every time. Here they are arranged once for all steps until they change, and adapters are added to
them. It takes a second copy of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.model.memory import total_memory
from pipeline.model.policy import Policy
from pipeline.model.shared_prefixes import LEAST_WIDTH
from pipeline.model.trunk import has_own_forward, project, projections

LARGEST = 1 / 8
"""Of the machine's memory, for the copy."""


class PackedWeights:
    """A policy's linear maps, arranged for products of some ``rows``; called like ``trunk.project``.

    What pays is packed: the projections of a forward of our own and the output head, on a processor, from a width of
    ``shared_prefixes.LEAST_WIDTH`` on (narrower policies keep their order of sums), where the copy has room.
    Everything else is multiplied as usual. Weights are those of when this was made.
    """

    def __init__(self, policy: Policy, rows: int) -> None:
        self._packed: dict[Any, Tensor] = {}
        head = policy.head
        layers: Any = policy.backbone.layers if has_own_forward(policy.backbone) else ()
        linears = [*(p for layer in layers for p in projections(layer)), head]
        if policy.device.type == "cpu" and head.in_features >= LEAST_WIDTH and _fit(linears, policy.model.dtype):
            with torch.no_grad():
                for linear in linears:
                    self._packed[linear] = torch.ops.mkldnn._reorder_linear_weight(_whole_weight(linear), rows)

    def __call__(self, x: Tensor, projection: Any) -> Tensor:
        """``x W^T + b`` (rows, out) of a linear map, its adapter included, without gradients."""
        packed = self._packed.get(projection)
        if packed is None:
            return project(x, projection)
        bias = getattr(projection, "base_layer", projection).bias
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return product


def _fit(linears: list[Any], dtype: torch.dtype) -> bool:
    """Whether oneDNN is there for this precision, and the machine's memory has room for the copy."""
    known = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    numbers = sum(linear.in_features * linear.out_features for linear in linears)
    return known and numbers * dtype.itemsize <= LARGEST * total_memory(torch.device("cpu"))


def _whole_weight(projection: Any) -> Tensor:
    """A linear map's weight (out, in), its adapter's product added."""
    linear = getattr(projection, "base_layer", projection)
    weight: Tensor = linear.weight
    if linear is projection:
        return weight
    a, b = (part["default"].weight for part in (projection.lora_A, projection.lora_B))
    return torch.addmm(weight.to(a.dtype), b, a, alpha=projection.scaling["default"]).to(weight.dtype)
