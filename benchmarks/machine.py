"""What the machine is, and what it could do: the peak of its matrix products."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.timing import repeated
from pipeline.model.kernels.library import library
from pipeline.planning.processor import processor

PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (512, 512, 128), (4096, 256, 1024))
"""Rows, inner size and columns of the products that are tried for the CPU's peak."""


def matrix_peak(
    threads: int, dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int, int]] = PRODUCTS
) -> dict[str, Any]:
    """FLOP/s of matrix products, the best of several shapes and repetitions: a peak is not an average."""
    torch.set_num_threads(threads)
    best = {}
    for m, k, n in shapes:
        a, b = torch.randn(m, k).to(device, dtype), torch.randn(k, n).to(device, dtype)
        calls = max(1, int(2e9 / (2 * m * k * n))) if device.type == "cpu" else 1
        seconds = repeated(lambda a=a, b=b, calls=calls: [a @ b for _ in range(calls)], 7, warm=2)  # type: ignore[misc]
        best[f"{m} x {k} x {n}"] = 2.0 * m * k * n * calls / min(seconds)
    torch.set_num_threads(1)
    return {"peak": max(best.values()), "by_shape": best}


def peaks() -> dict[str, Any]:
    """Of one and two threads of the CPU; ``skipped`` says why where the processor does not multiply a precision.

    A product in bfloat16 that PyTorch has to do number by number takes hundreds of times as long as in float32.
    """
    cpu, found = torch.device("cpu"), dict[str, Any]()
    small = {dtype: min(_product_seconds(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, seconds in small.items():
        slower, name = seconds / small[torch.float32], str(dtype).removeprefix("torch.")
        for threads in (1, 2):
            key = f"{name}, {threads} thread{'s' * (threads > 1)}"
            if slower > 8:
                found[key] = {"skipped": f"a product takes {slower:,.0f} times as long as in float32"}
            else:
                found[key] = matrix_peak(threads, dtype, cpu)
    return found


def _product_seconds(dtype: torch.dtype, size: int = 256) -> list[float]:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return repeated(lambda: a @ b, 3)


def machine() -> dict[str, Any]:
    """What figures are of."""
    loaded = library()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "kernels": "off" if loaded is None else loaded.instruction_set,
    }
