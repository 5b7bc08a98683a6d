"""What devices can do: by their vendors' data sheets, with shares of it that are assumed until somebody measures.

Peaks are of dense matrix products, without sparsity, in 10^12 FLOP/s; bandwidths in 10^9 bytes a second, of the interconnect
in one direction (half of what data sheets add up); memory in 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.planning.constants import Constants, Fit, constants_of
from pipeline.planning.work import PHASES
from pipeline.workspace.errors import UserError


class Sheet(NamedTuple):
    """A data sheet."""

    half: float
    """Peak in bfloat16 and float16, summed in float32."""
    single: float
    """Peak in float32 proper: PyTorch takes no TF32 unless it is told to."""
    bandwidth: float
    memory: float
    link: float
    """NVLink, or PCIe where there is none."""


SHEETS = {
    # NVIDIA A100 Tensor Core GPU data sheet (2021): 312 TFLOPS bfloat16, 19.5 float32; 1,555 and 2,039 GB/s; NVLink 600 GB/s.
    "A100-40": Sheet(312.0, 19.5, 1555.0, 40.0, 300.0),
    "A100-80": Sheet(312.0, 19.5, 2039.0, 80.0, 300.0),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM (2023): 1,979 TFLOPS bfloat16 with sparsity, 67 float32; 3.35 TB/s; 900 GB/s.
    "H100": Sheet(989.5, 67.0, 3350.0, 80.0, 450.0),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM (2024): as H100, 141 GB at 4.8 TB/s.
    "H200": Sheet(989.5, 67.0, 4800.0, 141.0, 450.0),
    # NVIDIA Blackwell architecture brief, HGX B200 (2024): 4.5 PFLOPS bfloat16 with sparsity, 80 TFLOPS float32; 8 TB/s;
    # NVLink 1.8 TB/s. Of 192 GB the data sheet of DGX B200 gives 180 to use.
    "B200": Sheet(2250.0, 80.0, 8000.0, 180.0, 900.0),
    # NVIDIA L40S data sheet (2023): 362.05 TFLOPS bfloat16, 91.6 float32; 864 GB/s; PCIe 4.0 x16, 64 GB/s both ways.
    "L40S": Sheet(362.05, 91.6, 864.0, 48.0, 32.0),
    # NVIDIA Ada GPU architecture white paper, appendix A (2022): 165.2 TFLOPS bfloat16 summed in float32, 82.6 float32;
    # 1,008 GB/s; PCIe 4.0 x16.
    "RTX4090": Sheet(165.2, 82.6, 1008.0, 24.0, 32.0),
}
FORWARD_SHARE, UPDATE_SHARE, BANDWIDTH_SHARE = 0.5, 0.4, 0.7
"""Assumed of the peaks of arithmetic, without and with a backward pass, and of memory."""
LAYER_SECONDS, TOKEN_SECONDS, TURN_SECONDS = 1e-4, 1e-5, 1e-4
"""Assumed of a layer's start (some twenty kernels from Python), of a token that Python handles, of an environment's turn."""
NETWORK = 1.25e9
"""Bytes a second between processors: a network of 10 Gbit/s, assumed."""


@dataclass(frozen=True)
class Device:
    """What work is planned on."""

    name: str
    memory: float
    """Bytes."""
    link: float
    """Bytes a second to another one."""
    fit: Fit
    measured: bool
    """Whether the constants are, or are assumed."""


def sheet_device(name: str, shape_dtype: torch.dtype) -> Device:
    """A device by its data sheet, computing in a precision; updates of float16 policies are in float32.

    Raises:
        UserError: it is not in the table.
    """
    if name not in SHEETS:
        allowed = ", ".join(SHEETS)
        raise UserError(f"--device: {name!r} is not known; allowed: {allowed}")
    sheet = SHEETS[name]
    moved = 1 / (BANDWIDTH_SHARE * sheet.bandwidth * 1e9)
    fit: dict[str, Constants] = {}
    for constants in dict.fromkeys(map(constants_of, PHASES)):
        backward = constants in ("update", "gradient shares")
        half = shape_dtype == torch.bfloat16 or (shape_dtype == torch.float16 and not backward)
        peak = 1e12 * (sheet.half if half else sheet.single) * (UPDATE_SHARE if backward else FORWARD_SHARE)
        each = {"sampling": TOKEN_SECONDS, "environment": TURN_SECONDS}.get(constants, TOKEN_SECONDS / 10)
        fit[constants] = Constants(1 / peak, moved, LAYER_SECONDS, each)
    return Device(name, 1e9 * sheet.memory, 1e9 * sheet.link, fit, measured=False)


def measured_device(name: str, memory: float, fit: Mapping[str, Constants]) -> Device:
    """A processor with constants that were fitted on it."""
    return Device(name, memory, NETWORK, fit, measured=True)
