"""A cluster of two nodes, of which one cannot write temporary files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.data import config_of

ROOT = Path(__file__).parents[2]

SCRIPT = """
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
        [sys.executable, "-c", SCRIPT, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=540, check=False
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
