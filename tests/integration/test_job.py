"""`ray job submit` to a head node that is started as in docs/clusters.md: a run to its end, and the same run again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from reinforce.dataset.runs.progress import list_runs, read_progress
from reinforce.storage import Storage
from tests.helpers.data import config_of, free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """Environment variables for `ray job submit` to a new head node."""
    dashboard = free_port()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "AWS_ENDPOINT_URL")}
    environment |= {
        "PATH": f"{BIN}:{environment['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--no-monitor", "--disable-usage-stats"]
    command += [f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    command += ["--min-worker-port=30000", "--max-worker-port=30999"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # the default is taken by the session's Ray
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not _answers(dashboard):
        assert process.poll() is None, "the head did not start"
        assert time.monotonic() < deadline, "the head does not answer"
        time.sleep(0.2)
    yield environment
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_submitted_run_finishes_and_the_same_run_again_does_nothing(
    head: dict[str, str], shards: Callable[..., str], tmp_path: Path
) -> None:
    work = tmp_path / "checkout"
    for folder in ("reinforce", "teachers", "schemas", "jobs", "tests"):
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = config_of(shards(6, 3), tmp_path / "out")
    config["teachers"]["red"] = {"class": "tests.helpers.models:PrintingTeacher"}
    (work / "job.yaml").write_text(yaml.safe_dump(config))

    program = "python jobs/reinforce_dfn.py --config job.yaml"
    stamps = f"find {tmp_path}/out -name '*.parquet' -printf '%p %T@\\n' | sort"
    entry = f"{program} && {stamps} > before && {program} && {stamps} > after && cmp before after && wc -l < after"
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "sh", "-c"]
    command += [f"{entry} && ! {program} --set output=runs/out"]
    for _ in range(120):
        done = subprocess.run(command, cwd=work, env=head, capture_output=True, text=True, timeout=1080, check=False)
        if not any(early in done.stderr for early in ("No available agent", "Failed to connect")):  # of a starting head
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 samples" in done.stdout
    [run] = list_runs(store := Storage(str(tmp_path / "out")))
    progress = read_progress(store, run)
    assert progress is not None
    assert f"{progress.log_command()}\n".removesuffix(" --follow\n") in done.stdout, "Ray names the same command"
    assert "\x1b[2K" not in done.stdout, "the log of a job has no control sequences"
    assert re.search(r"^\(\w+ pid=\d+\) printed by a worker$", done.stdout, re.MULTILINE), "nor colours"
    assert "nothing to do" in done.stdout
    assert re.search(rf"^{2 * 8 + 8}$", done.stdout, re.MULTILINE), "two shards and the index of each layer, unchanged"
    assert "error: output runs/out is in the temporary folder of a Ray job" in done.stdout
