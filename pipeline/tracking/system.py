"""The machine's load, under the names that MLflow gives it, so that its pages show it as system metrics."""

from __future__ import annotations

import psutil


class SystemMetrics:
    """Measured once an iteration in the training's own process.

    MLflow's monitor would be a thread that talks to the store by itself, and is lost or noisy when that is away.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()  # the next call measures from here

    def measure(self) -> dict[str, float]:
        """CPU use of the machine in percent since the last call, memory in megabytes (and percent) now.

        ``process_memory`` is this process's resident memory; the GPU's is what all processes use of the current one.
        """
        import torch  # takes seconds, which a comparison need not spend

        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        if torch.cuda.is_available():
            device = torch.cuda.current_device()
            free, total = torch.cuda.mem_get_info(device)
            found[f"gpu_{device}_memory_usage_megabytes"] = (total - free) / 1e6
            found[f"gpu_{device}_memory_usage_percentage"] = 100 * (total - free) / total
        return {f"system/{name}": round(value, 1) for name, value in found.items()}
