"""Description of the machine that a benchmark ran on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reinforce.processes.cores import available_cores


def machine_name() -> str:
    """Return processor and number of cores as text."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Return processor, available cores, load, system, and versions of Python and of installed ``packages``."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "load average": None if load is None else round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu_name() -> str:
    """Return the model of the processor, from /proc/cpuinfo where it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
