"""What the machine calls its processor."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """As Linux calls it, with family and model, which a virtual machine's name leaves out."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    except OSError:
        lines = []
    words = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    name = words.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {words['cpu family']}, model {words['model']})" if "cpu family" in words else name
