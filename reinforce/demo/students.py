"""The demo's trainings, two at a time: each has one core, which they use better than one training uses two."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from reinforce.demo.compare import CONFIG
from reinforce.errors import UserError

AT_ONCE = 2


def train_side_by_side(trainings: Mapping[str, Sequence[str]]) -> None:
    """Run ``reinforce train CONFIG`` for each name with its overrides, AT_ONCE at a time; lines are told by name.

    A finished one costs nothing, one that was cut off goes on. Raises UserError where one fails, after ending the rest.
    """
    width = max(map(len, trainings))
    running: list[subprocess.Popen[str]] = []
    telling, failed = threading.Lock(), threading.Event()

    def tell(name: str, line: str) -> None:
        with telling:
            print(f"{name:{width}} | {line}", flush=True)

    def run(name: str, changes: Sequence[str]) -> int:
        arguments = [word for change in changes for word in ("--set", change)]
        with telling:
            if failed.is_set():
                return 0
            print(f"{name:{width}} | reinforce train {CONFIG} {' '.join(arguments)}", flush=True)
            process = subprocess.Popen(  # noqa: S603 - this program itself
                [sys.executable, "-m", "reinforce", "train", CONFIG, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            )
            running.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            tell(name, line.rstrip("\n"))
        if status := process.wait():
            failed.set()
        return status

    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = {pool.submit(run, name, changes): name for name, changes in trainings.items()}
        try:
            for ended in as_completed(started):
                if status := ended.result():
                    raise UserError(f"the training {started[ended]!r} ended with status {status}; see its lines above.")
        finally:
            failed.set()
            with telling:
                for process in running:
                    if process.poll() is None:
                        process.terminate()
