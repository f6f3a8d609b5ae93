"""Stored results of benchmarks."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce.shipping.machine import describe_machine


def write_results(path: Path, packages: Sequence[str], results: Mapping[str, Any]) -> None:
    """Write results as JSON, after the date, the machine and the versions of ``packages``."""
    about = {"date": datetime.date.today().isoformat(), **describe_machine(packages)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **results}, indent=2) + "\n", encoding="utf-8")
