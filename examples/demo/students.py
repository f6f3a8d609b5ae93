"""Run the demo's training runs two at a time: two training runs with one core each are faster than one with two
cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from examples.demo.compare import CONFIG
from reinforce.errors import UserError

MAX_PARALLEL = 2
_SHOWN = re.compile(r"step [\d,]+ of |resuming ")  # the lines of a training run that are shown; metrics are in its log
_LAST_LINES = 20


def train_side_by_side(trainings: Mapping[str, Sequence[str]], logs: str | Path) -> None:
    """Run ``reinforce train CONFIG`` for each name with its overrides, and show their progress.

    The output of each is in ``logs``/NAME.log. Finished training runs are skipped, interrupted ones are resumed. If one
    fails, the others are terminated, its last lines are shown and UserError is raised.
    """
    width = max(map(len, trainings))
    folder = Path(logs)
    folder.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[str]] = []
    lock, failed = threading.Lock(), threading.Event()

    def show(name: str, line: str) -> None:
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
        last = deque[str](maxlen=_LAST_LINES)
        with open(folder / f"{name}.log", "a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                last.append(line.rstrip("\n"))
                if _SHOWN.match(line):
                    show(name, last[-1])
        if status := process.wait():
            if not failed.is_set():  # the others are terminated because of the first
                for line in last:
                    show(name, line)
            failed.set()
        return status

    with ThreadPoolExecutor(MAX_PARALLEL) as pool:
        started = {pool.submit(run, name, overrides): name for name, overrides in trainings.items()}
        try:
            for future in as_completed(started):
                if status := future.result():
                    name = started[future]
                    log = folder / f"{name}.log"
                    raise UserError(f"the training {name!r} failed with status {status}; its output is in {log}.")
        finally:
            failed.set()
            with lock:
                for process in running:
                    if process.poll() is None:
                        process.terminate()
