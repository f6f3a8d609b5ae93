"""Loader processes when the training is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.reinforced import small_dataset

ROOT = Path(__file__).parents[3]

TRAINING = """
import os, sys, time
from multiprocessing import active_children, forkserver
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from tests.helpers.reinforced import letters

if __name__ == "__main__":
    data = Data.model_validate({"datasets": sys.argv[1], "workers": 2, "window": 10})
    batches = StudentFeed(data, seed=5, size=20, tokenize=letters).batches(0, 1, 4, 0)
    next(batches)
    print(*(child.pid for child in active_children()), forkserver._forkserver._forkserver_pid, flush=True)
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_loader_processes_and_their_server_end_when_the_training_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    url = small_dataset(tmp_path / "dataset")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script, url], stdout=subprocess.PIPE, text=True, env=environment
    ) as training:
        assert training.stdout is not None
        pids = [int(pid) for pid in training.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
        training.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
