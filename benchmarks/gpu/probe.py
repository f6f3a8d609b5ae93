"""Clocks, power, temperature and memory of a card while a section runs, as nvidia-smi reads them twice a second."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

_FIELDS = {
    "clocks.sm": "clock MHz",
    "clocks.mem": "memory clock MHz",
    "power.draw": "power W",
    "power.limit": "power limit W",
    "temperature.gpu": "temperature C",
    "memory.used": "memory MiB",
    "utilization.gpu": "utilization %",
}
_MILLISECONDS = 500
_NEAR_LIMIT = 0.97
ABSENT = {"absent": "clocks, power and memory are not recorded: there is no nvidia-smi"}


@contextlib.contextmanager
def probing(device: str) -> Iterator[dict[str, Any]]:
    """Fill a dict by [median, lowest, highest] of each reading in the block, and the share at the power limit."""
    found: dict[str, Any] = {}
    if not device.startswith("cuda") or shutil.which("nvidia-smi") is None:
        found.update(ABSENT)
        yield found
        return
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "-lms"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(  # noqa: S603
            [*query, str(_MILLISECONDS), "-i", _card_id(device)], stdout=output
        )
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
        output.seek(0)
        found.update(summarize(output.read()))


def summarize(text: str) -> dict[str, Any]:
    """What ``probing`` returns, of the lines that nvidia-smi printed."""
    rows = [line.split(",") for line in text.splitlines() if line.count(",") == len(_FIELDS) - 1]
    columns = {name: [_number(row[place]) for row in rows] for place, name in enumerate(_FIELDS.values())}
    found: dict[str, Any] = {
        name: [statistics.median(known), min(known), max(known)]
        for name, values in columns.items()
        if (known := [value for value in values if value is not None])
    }
    pairs = zip(columns["power W"], columns["power limit W"], strict=True)
    near = [draw >= _NEAR_LIMIT * limit for draw, limit in pairs if draw is not None and limit]
    if near:
        found["at power limit"] = round(sum(near) / len(near), 3)
    return found or {"absent": "nvidia-smi printed no readings"}


def _card_id(device: str) -> str:
    """The card for nvidia-smi, which numbers cards in another way than torch if CUDA_VISIBLE_DEVICES is set."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(torch.device(device).index or 0) if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def _number(text: str) -> float | None:
    """A reading, None for one that a card does not have, such as [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None
