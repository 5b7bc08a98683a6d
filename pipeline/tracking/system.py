"""The machine's load, under the names that MLflow gives it, so that its pages show it as system metrics."""

import contextlib

import psutil


class SystemMetrics:
    """Measured once an iteration in the training's own process.

    MLflow's monitor would be a thread that talks to the store by itself, and is lost or noisy when that is away.
    """

    def __init__(self) -> None:
        with contextlib.suppress(Exception):  # see ``measure``
            psutil.cpu_percent()  # the next call measures from here

    def measure(self) -> dict[str, float]:
        """CPU use of the machine in percent since the last call, memory in megabytes (and percent) now.

        ``process_memory`` is this process's resident memory; the GPU's is what all processes use of the current one. What
        cannot be measured here is left out, whatever it fails with: no training ends for the sake of its record.
        """
        found: dict[str, float] = {}
        for measured in (_cpu, _memory, _own_memory, _gpu):
            with contextlib.suppress(Exception):
                found |= measured()
        return {f"system/{name}": round(value, 1) for name, value in found.items()}


def _cpu() -> dict[str, float]:
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def _memory() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
    }


def _own_memory() -> dict[str, float]:
    return {"process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6}


def _gpu() -> dict[str, float]:
    import torch  # takes seconds, which a comparison need not spend

    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    return {
        f"gpu_{device}_memory_usage_megabytes": (total - free) / 1e6,
        f"gpu_{device}_memory_usage_percentage": 100 * (total - free) / total,
    }
