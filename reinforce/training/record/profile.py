"""A trace of some steps of a training run, for Perfetto and chrome://tracing, and a table of the longest operations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from reinforce.storage import Storage
from teachers.runtime.accelerator import Accelerator

FOLDER = "profile"
_AFTER, _ROWS, _NAME = 10, 25, 60
_MAX_BYTES = 256 * 2**20


class StepProfiler:
    """Traces ``count`` steps, from ten after ``step``, or earlier where a training run of ``steps`` steps has fewer.

    ``begin_step`` and ``end_step`` are called for every step (from 0). A trace has the operations and kernels of a
    step, without shapes and stacks; one of more than 256 MiB is not kept, only its table.
    """

    def __init__(self, storage: Storage, accelerator: Accelerator, count: int, step: int, steps: int) -> None:
        self._storage, self._accelerator = storage, accelerator
        self._first = max(step, min(step + _AFTER, steps - count))
        self._last = min(self._first + count, steps) - 1
        self._profile: Any = None

    def begin_step(self, step: int) -> None:
        if step == self._first:
            self._accelerator.synchronize()
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._accelerator.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, acc_events=True)
            self._profile.start()

    def end_step(self, step: int) -> list[str]:
        """Lines for the user after the last traced step, when the files are in the output; else none."""
        if self._profile is None or step != self._last:
            return []
        self._accelerator.synchronize()
        self._profile.stop()
        first, last = self._first + 1, self._last + 1
        name = f"steps-{first:09d}-{last:09d}"
        lines = _table(self._profile, last - first + 1)
        with self._storage.temporary_folder() as folder:
            trace = Path(folder, f"{name}.json.gz")
            self._profile.export_chrome_trace(str(trace))
            too_large = os.path.getsize(trace) > _MAX_BYTES
            if too_large:
                trace.unlink()
            Path(folder, f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            self._storage.put_folder(folder, FOLDER)
        self._profile = None
        kept = "its trace is larger than 256 MiB and was left out" if too_large else f"trace: {FOLDER}/{trace.name}"
        return [f"profile of steps {first:,} to {last:,}; {kept}; table: {FOLDER}/{name}.txt", *lines]


def _table(profile: Any, steps: int) -> list[str]:
    """The operations that take longest by themselves, on the device where there is one, in milliseconds a step."""
    events = profile.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    clock = "self_device_time_total" if on_device else "self_cpu_time_total"
    times = sorted(((getattr(event, clock), event.count, event.key) for event in events), reverse=True)
    total = sum(time for time, _, _ in times) or 1.0
    rows = [f"{'ms a step':>10} {'share':>6} {'calls':>8}  operation ({'device' if on_device else 'CPU'} time)"]
    for time, calls, name in times[:_ROWS]:
        if time > 0:
            rows.append(f"{time / 1000 / steps:10.2f} {time / total:6.1%} {calls / steps:8.0f}  {name[:_NAME]}")
    return rows
