"""Clusters of several nodes: the pool follows nodes that join, are lost, are drained, or cannot write files.

And `ray job submit` to a head node that is started as in docs/clusters.md: a run to its end, and the same run again.
"""

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

from reinforce.dataset.runs import list_runs, read_progress
from reinforce.storage import Storage
from tests.helpers.commands import json_of_process
from tests.helpers.data import config_of, events_of, free_port, tree
from tests.helpers.reinforced import fresh_dataset
from tests.helpers.waiting import wait_for

ROOT = Path(__file__).parents[2]

#: Runs a cluster and a run in a process of its own, separate from the session's Ray.
SCRIPT = """
import json, subprocess, sys, time
from pathlib import Path
from ray import _raylet
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from tests.helpers.data import events_of

config, output, log, quick = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])

def wait(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, f"the run ended too soon: {run.returncode}, {open(log).read()}"
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.1)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
first = cluster.add_node(num_cpus=1)
with open(log, "w") as out:
    command = [sys.executable, "-m", "reinforce", "run", config, "--address", cluster.address]
    run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    wait(lambda: len(list((output / "samples").glob("*.parquet"))) >= 2)
    second = cluster.add_node(num_cpus=1)
    wait(lambda: len(events_of(output, "worker_started")) >= 2)
    cluster.remove_node(first, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    wait(lambda: len(events_of(output, "worker_started")) >= 3)
    gcs, deadline = _raylet.GcsClient(address=cluster.address), int((time.time() + 300) * 1000)
    gcs.drain_node(second.node_id, DRAIN_NODE_REASON_PREEMPTION, "a preemption notice", deadline)
    wait(lambda: events_of(output, "worker_drained"))
    wait(lambda: second.dead_processes())  # Ray ends a drained node once it is idle
    quick.touch()
    status = run.wait(600)
kinds = ("worker_died", "shard_quarantined", "node_drained", "worker_drained", "shard")
print(json.dumps({"status": status, "drained": second.node_id, **{kind: events_of(output, kind) for kind in kinds}}))
cluster.shutdown()
"""


def test_the_pool_follows_the_cluster_and_lost_and_drained_nodes_cost_no_shard(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(*[2] * 80), tmp_path / "out", captioners={}, workers={"batch": 32})
    config["teachers"] = {"red": {"class": "tests.helpers.models:ColorTeacher"}}
    path, quick = tmp_path / "config.yaml", tmp_path / "quick"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    delays = {"TESTS_DELAY": "3", "TESTS_UNTIL": str(quick)}
    found = json_of_process(SCRIPT, path, tmp_path / "out", tmp_path / "log", quick, **delays)
    assert found["status"] == 0, (tmp_path / "log").read_text()
    assert [event["node_lost"] for event in found["worker_died"]] == [True], "none dies on the drained node"
    assert found["shard_quarantined"] == []
    [notice], [end] = found["node_drained"], found["worker_drained"]
    assert notice["node"] == end["node"] == found["drained"]
    assert 200 < notice["seconds"] <= 300
    assert notice["shards"]
    times = {event["shard"]: event["time"] for event in found["shard"]}
    assert all(notice["time"] <= times[shard] <= end["time"] for shard in notice["shards"]), "what is in flight ends"
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))


LOST_NODE = """
import json, sys
import ray
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from ray.cluster_utils import Cluster
from reinforce.processes.parallel import Actors, open_workers
from tests.helpers.waiting import wait_for
from tests.integration.test_cluster import wait_in

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False)
kept, found = cluster.add_node(num_cpus=1), []
for kind, open_map in {"tasks": open_workers, "actors": lambda: Actors(2, 0)}.items():
    lost, folder = cluster.add_node(num_cpus=1), Path(sys.argv[1], kind)
    folder.mkdir()
    with open_map() as workers, ThreadPoolExecutor(1) as thread:
        computed = thread.submit(list, workers.map(partial(wait_in, str(folder)), range(6)))
        wait_for(lambda: len(list(folder.glob("begun-*"))) == 2)
        cluster.remove_node(lost, allow_graceful=False)
        pids = [file.name.rpartition("-")[2] for file in folder.glob("begun-*")]
        wait_for(lambda: not all(Path("/proc", pid).exists() for pid in pids))
        (folder / "go-on").touch()
        found.append([sorted(computed.result()), workers.limit(), len(list(folder.glob("begun-*")))])
ray.shutdown()
cluster.shutdown()
print(json.dumps(found))
"""


def wait_in(folder: str, item: int) -> int:
    """Return an item once a file says so; each attempt at it leaves a file."""
    Path(folder, f"begun-{item}-{os.getpid()}").touch()
    wait_for(Path(folder, "go-on").exists)
    return item


@pytest.mark.slow
def test_an_item_of_a_map_whose_node_is_lost_is_computed_on_another(tmp_path: Path) -> None:
    tasks, actors = json_of_process(LOST_NODE, tmp_path)
    every = [[item, item] for item in range(6)]
    assert (tasks[0], tasks[2]) == (every, 7), "one item is computed twice"
    assert actors == [every, 1, 7], "the actor of the lost node is not replaced"


TWO_NODES = """
import json, sys
import ray, yaml
from ray.cluster_utils import Cluster
import reinforce

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
summary = reinforce.run(yaml.safe_load(open(sys.argv[1])))
print(json.dumps([summary.status, summary.quarantined_shards, summary.samples, list(summary.notes)]))
"""


@pytest.mark.slow
def test_a_node_with_a_full_temporary_folder_costs_no_shard_and_is_avoided(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    options = {"marker": str(tmp_path / "bad-node"), "delay": 0.5}
    teachers = {"ill": {"class": "tests.helpers.models:FullNodeTeacher", "options": options}}
    config = config_of(shards(*[4] * 20), tmp_path / "out", captioners={}, teachers=teachers)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "workers": {"batch": 16, "recycle": 6}}, sort_keys=False))
    status, quarantined, samples, notes = json_of_process(TWO_NODES, path)
    assert (status, quarantined, samples) == (0, 0, 80)
    bad, out = (tmp_path / "bad-node").read_text(), tmp_path / "out"
    replaced, started = events_of(out, "worker_replaced"), events_of(out, "worker_started")
    assert {event["node"] for event in replaced} == {bad}
    assert 2 <= len(replaced) <= 3
    assert "No space left on device" in replaced[0]["reason"]
    assert len(events_of(out, "shard_raised")) <= 20
    assert any("gets no new workers for 10 minutes" in note for note in notes)
    noted = min(event["time"] for event in events_of(out, "note") if "no new workers" in event["text"])
    assert bad not in [event["node"] for event in started if event["time"] > noted]
    assert len(started) >= 4, "workers are restarted after six shards"
    assert events_of(out, "worker_recycled")


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
    wait_for(lambda: process.poll() is not None or _answers(dashboard))
    assert process.poll() is None, "the head did not start"
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
    command += [entry]
    starting = ("No available agent", "Failed to connect", "Remote end closed connection")  # of a starting head
    for _ in range(120):
        done = subprocess.run(command, cwd=work, env=head, capture_output=True, text=True, timeout=1080, check=False)
        if not any(error in done.stderr for error in starting):
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 samples" in done.stdout
    [run] = list_runs(store := Storage(str(tmp_path / "out")))
    progress = read_progress(store, run)
    assert f"{progress.log_command()}\n".removesuffix(" --follow\n") in done.stdout, "Ray names the same command"
    assert "\x1b[2K" not in done.stdout, "the log of a job has no control sequences"
    assert re.search(r"^\(\w+ pid=\d+\) printed by a worker$", done.stdout, re.MULTILINE), "nor colours"
    assert "nothing to do" in done.stdout
    assert re.search(rf"^{2 * 8 + 8}$", done.stdout, re.MULTILINE), "two shards and the index of each layer, unchanged"
