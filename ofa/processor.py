"""What Linux tells of the processor."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def facts() -> dict[str, str]:
    """The fields of the first processor ("vendor_id", "model name", "flags"; on ARM "Features"); none elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def name() -> str:
    """The processor's name, or its architecture where no more is told."""
    return facts().get("model name") or platform.processor() or platform.machine()


def flags() -> str:
    """The instruction sets it has, in Linux's words, separated by blanks."""
    return facts().get("flags") or facts().get("Features") or platform.processor()


def saturates() -> bool:
    """Whether it adds pairs of 8-bit products in 16 bits: x86 without VNNI."""
    return platform.machine() in ("x86_64", "AMD64") and "vnni" not in flags()
