"""Clusters of several nodes: the pool follows nodes that join, are lost, are drained, or cannot write files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.data import config_of, tree
from tests.helpers.reinforced import fresh_dataset

ROOT = Path(__file__).parents[2]

#: Runs a cluster and a run in a process of its own, separate from the session's Ray.
SCRIPT = """
import json, subprocess, sys, time
from pathlib import Path
from ray import _raylet
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
import pytest
from tests.helpers.lean_ray import prepare

prepare(pytest.MonkeyPatch())
config, output, log, quick = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])

def events(kind):
    lines = [l for p in output.glob("runs/*/events-*.jsonl") for l in p.read_text().splitlines()]
    return [e for e in map(json.loads, lines) if e["event"] == kind]

def wait(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, f"the run ended too soon: {run.returncode}"
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.1)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
first = cluster.add_node(num_cpus=1)
with open(log, "w") as out:
    command = [sys.executable, "-m", "reinforce", "run", config, "--address", cluster.address]
    run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    wait(lambda: len(list((output / "samples").glob("*.parquet"))) >= 2)
    second = cluster.add_node(num_cpus=1)
    wait(lambda: len(events("worker_started")) >= 2)
    cluster.remove_node(first, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    wait(lambda: len(events("worker_started")) >= 3)
    gcs, deadline = _raylet.GcsClient(address=cluster.address), int((time.time() + 300) * 1000)
    gcs.drain_node(second.node_id, DRAIN_NODE_REASON_PREEMPTION, "a preemption notice", deadline)
    wait(lambda: events("worker_drained"))
    wait(lambda: second.dead_processes())  # Ray ends a drained node once it is idle
    quick.touch()
    status = run.wait(600)
kinds = ("worker_died", "shard_quarantined", "node_drained", "worker_drained", "shard")
print(json.dumps({"status": status, "drained": second.node_id, **{kind: events(kind) for kind in kinds}}))
cluster.shutdown()
"""


def test_the_pool_follows_the_cluster_and_lost_and_drained_nodes_cost_no_shard(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(*[2] * 120), tmp_path / "out", captioners={}, workers={"batch": 32})
    config["teachers"] = {"red": {"class": "tests.helpers.models:ColorTeacher"}}
    path, quick = tmp_path / "config.yaml", tmp_path / "quick"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "out"), str(tmp_path / "log"), str(quick)],
        cwd=ROOT,
        env={**os.environ, "TESTS_DELAY": "2", "TESTS_UNTIL": str(quick)},
        capture_output=True,
        text=True,
        timeout=1080,
        check=False,
    )
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == 0, log
    assert [event["node_lost"] for event in found["worker_died"]] == [True], "none dies on the drained node"
    assert found["shard_quarantined"] == []
    [notice], [end] = found["node_drained"], found["worker_drained"]
    assert notice["node"] == end["node"] == found["drained"]
    assert 200 < notice["seconds"] <= 300
    assert notice["shards"]
    times = {event["shard"]: event["time"] for event in found["shard"]}
    assert all(notice["time"] <= times[shard] <= end["time"] for shard in notice["shards"]), "what is in flight ends"
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))


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
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1080,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    status, quarantined, samples, notes = json.loads(done.stdout.splitlines()[-1])
    assert (status, quarantined, samples) == (0, 0, 80)
    lines = [line for path in tmp_path.glob("out/runs/*/events-*.jsonl") for line in path.read_text().splitlines()]
    events = [json.loads(line) for line in lines]
    bad = (tmp_path / "bad-node").read_text()
    replaced = [event for event in events if event["event"] == "worker_replaced"]
    assert {event["node"] for event in replaced} == {bad}
    assert 2 <= len(replaced) <= 3
    assert "No space left on device" in replaced[0]["reason"]
    assert len([event for event in events if event["event"] == "shard_raised"]) <= 20
    assert any("gets no new workers for 10 minutes" in note for note in notes)
    started = [event["node"] for event in events if event["event"] == "worker_started"]
    noted = min(i for i, event in enumerate(events) if "no new workers" in event.get("text", ""))
    assert bad not in [event["node"] for event in events[noted:] if event["event"] == "worker_started"]
    assert len(started) >= 4, "workers are restarted after six shards"
    assert any(event["event"] == "worker_recycled" for event in events)
