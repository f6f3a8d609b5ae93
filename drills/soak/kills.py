"""Processes of a run that are killed, for ``drills.soak.faults``: the run is a process with a Ray of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from drills.soak.bench import Bench
from tests.helpers.waiting import processes_below, wait_for

#: How the commands of processes begin.
WORKER, DECODER = "ray::Worker", f"{sys.executable} -I -c"
ROOT = Path(__file__).parents[2]
_LIMIT_SECONDS = 400
#: What a command does before it starts Ray where Ray's own process is to be one that does nothing.
_LATE_RAYLET = "import ray._private.services as s; s.RAYLET_EXECUTABLE = {path!r}; "


@dataclass(frozen=True)
class Kill:
    """A process that is killed, by the start of its command, once objects match ``after``; None if none is.

    ``error`` is in the last line of the run, '' if it must be complete; None if the driver is killed.
    """

    name: str
    process: str | None
    after: str = "embeddings/**/*.parquet"
    error: str | None = ""


KILLS = [
    Kill("a worker is killed", WORKER),
    Kill("a decode process is killed", DECODER),
    Kill("the driver is killed while it has claims", "driver", "claims/*.json", None),
    Kill("the driver is killed in the middle", "driver", error=None),
    Kill("Ray's control service is killed", "gcs_server", error="Ray's control service ended before the run did"),
    Kill("Ray's raylet is killed", "raylet", error="Ray ended on this machine before the run did"),
    Kill("Ray does not start in time", None, error="Ray did not start on this machine"),
]


def run_killed(bench: Bench, kill: Kill, name: str) -> str:
    """Run the config of a case in a process, and kill what ``kill`` names -> the last line of an error, or ''.

    Raises AssertionError where it ends otherwise than ``kill`` says.
    """
    folder = bench.folder / name
    folder.mkdir()
    path, log = folder / "config.yaml", folder / "log"
    path.write_text(yaml.safe_dump(bench.config(name)))
    start = f"from reinforce.cli import main; main(['run', {str(path)!r}])"
    if kill.process is None:
        raylet = folder / "raylet"
        raylet.write_text("#!/bin/sh\nexec sleep 1000\n")
        raylet.chmod(0o755)
        start = _LATE_RAYLET.format(path=str(raylet)) + start
    environment = {**os.environ, "TESTS_DELAY": "0.5", "RAY_worker_niceness": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with log.open("wb") as output:
        run = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        if kill.process is not None:
            wait_for(
                lambda: run.poll() is not None or bench.s3.glob(f"bucket/{name}/out/{kill.after}"),
                lambda: f"no progress: {log.read_text(errors='replace')[-500:]}",
                _LIMIT_SECONDS,
            )
            pids = [run.pid] if kill.process == "driver" else processes_below(run.pid, kill.process)
            assert pids, f"no process {kill.process}"
            os.kill(pids[0], signal.SIGKILL)
        run.wait(_LIMIT_SECONDS)
    finally:
        run.kill()
        run.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    if kill.error is None:
        return "killed"
    assert not any("Traceback" in line for line in lines), lines[-20:]
    assert run.returncode == (1 if kill.error else 0), lines[-5:]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert len(errors) == bool(kill.error), lines[-5:]
    assert kill.error in "".join(errors), errors
    return "".join(errors)
