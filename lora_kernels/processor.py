"""The CPU's name, as its maker gives it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["processor_name"]


def processor_name() -> str:
    """Of ``/proc/cpuinfo``; where there is none, what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
