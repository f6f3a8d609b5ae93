"""Run the demo's trainings two at a time: two trainings with one core each are faster than one with two cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from reinforce.demo.compare import CONFIG
from reinforce.errors import UserError

MAX_PARALLEL = 2


def train_side_by_side(trainings: Mapping[str, Sequence[str]]) -> None:
    """Run ``reinforce train CONFIG`` for each name with its overrides; output lines are prefixed with the name.

    Finished trainings are skipped, interrupted ones are resumed. If one fails, the others are terminated and UserError
    is raised.
    """
    width = max(map(len, trainings))
    running: list[subprocess.Popen[str]] = []
    lock, failed = threading.Lock(), threading.Event()

    def log(name: str, line: str) -> None:
        with lock:
            print(f"{name:{width}} | {line}", flush=True)

    def run(name: str, overrides: Sequence[str]) -> int:
        arguments = [word for override in overrides for word in ("--set", override)]
        with lock:
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
            log(name, line.rstrip("\n"))
        if status := process.wait():
            failed.set()
        return status

    with ThreadPoolExecutor(MAX_PARALLEL) as pool:
        started = {pool.submit(run, name, overrides): name for name, overrides in trainings.items()}
        try:
            for future in as_completed(started):
                if status := future.result():
                    name = started[future]
                    raise UserError(f"the training {name!r} failed with status {status}; see its output above.")
        finally:
            failed.set()
            with lock:
                for process in running:
                    if process.poll() is None:
                        process.terminate()
