"""FSDP2 by Lightning, with the checkpoints of every other strategy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from pipeline.model.shards import whole


class Sharded(ModelParallelStrategy):
    """``ModelParallelStrategy`` whose checkpoints hold whole weights and states, as one process writes and reads them.

    Lightning's own tell Adam's states apart by the places of weights in the module, frozen ones included, and begin a state
    where there is none yet, which counts as a step.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._whole(plain.state_dict())

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        parts = {name: _part(weight, own[name]) for name, weight in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            states = {
                place: {name: _part(value, weights[place]) for name, value in state.items()}
                for place, state in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": states})

    def _whole(self, states: dict[str, Any]) -> dict[str, Any]:
        """With whole tensors, in main memory: the first process writes them, the others need none of them."""

        def taken(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            everything = whole(value.detach())
            return everything.cpu() if self.is_global_zero else torch.empty(0)

        found: dict[str, Any] = tree_map(taken, states)
        return found


def _part(value: Any, own: Any) -> Any:
    """This process's part of a tensor of the shape of one that is shared out; anything else is what it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes a second

    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
