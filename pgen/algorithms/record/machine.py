"""The processor of this machine, as far as it matters for what is compiled for it, and for who multiplies matrices."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """Make, model and instructions: code that is compiled for one processor may stop another."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = text.partition("\n\n")[0].splitlines()
    kept = (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "flags",
        "Features",
        "CPU implementer",
        "CPU part",
    )
    return "\n".join(line for line in lines if line.partition("\t")[0].partition(":")[0].strip() in kept)


def is_amd() -> bool:
    """Whether AMD made it."""
    return "AuthenticAMD" in processor()
