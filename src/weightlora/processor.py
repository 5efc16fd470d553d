"""Which processor this is, as far as the system tells it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """Return the processor's name: ``AMD EPYC 7763 64-Core Processor``, or the machine's kind where nobody tells."""
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() knows no name there
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    told = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(told, platform.processor() or platform.machine())
