"""How many processes do one training together, and what each of them holds."""

from typing import Literal

from pipeline.settings.section import Count, Section


class Processes(Section):
    """The processes of one training, on one machine (docs/scaling.md). A training may go on with another number of them."""

    number: Count = 1
    """How many. They are among the ``workers``: of these as many seeds are trained at once as have room. Each samples groups
    of its own; more of them than groups would have nothing to do."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """``auto`` is one process. With ``ddp`` each of several holds all weights; with ``fsdp2`` a part of the policy's, of their
    gradients and of Adam's moments."""

    def check(self) -> None:
        if self.number == 1 and self.strategy != "auto":
            raise ValueError(f"strategy: {self.strategy!r} has no effect with one process; allowed: auto")
        if self.number > 1 and self.strategy == "auto":
            raise ValueError(f"strategy: 'auto' is one process, and number is {self.number}; allowed: ddp, fsdp2")


def check_processes(plan: Processes, workers: int, groups: int, adapters: bool) -> None:
    """What the processes of a training ask of ``workers``, ``rollout.groups`` and ``train.lora``.

    Raises:
        ValueError: they ask for something else; it says what is allowed.
    """
    key = f"train.processes.number: {plan.number} processes are more than"
    if plan.number > workers:
        raise ValueError(f"{key} workers ({workers}), among which they are")
    if plan.number > groups:
        raise ValueError(f"{key} rollout.groups ({groups}), of which each samples its own")
    if plan.strategy == "fsdp2" and adapters:
        raise ValueError(
            "train.processes.strategy: 'fsdp2' is not allowed with train.lora: the weights under adapters are the reference "
            "policy's, which every process holds; allowed: ddp"
        )
