"""What figures were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine_name() -> str:
    """Processor and cores, in words."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def machine(packages: Iterator[str] | tuple[str, ...]) -> dict[str, Any]:
    """Processor, cores that this process may use, memory and load, and versions of Python and of ``packages``."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load average": None if load is None else round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def cpu_name() -> str:
    """The model of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
