"""Resources that run out: a disk while files are written, and the memory of a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import reinforce
from tests.helpers.data import config_of, tree
from tests.helpers.local_ray import local_ray
from tests.helpers.reinforced import fresh_dataset

ROOT = Path(__file__).parents[2]
DISK_BYTES = 300_000  # room for the first few shards

#: A run on a Ray of its own, whose memory monitor allows 4 GiB more than are in use now: other tests take some of it.
SCRIPT = """
import json, sys
import ray, yaml
from ray._private.utils import get_system_memory, get_used_memory
import reinforce

limit = (get_used_memory() + 4 * 2**30) / get_system_memory()
assert limit < 0.97, "too little memory is free for this test"
system = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 100}
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=system)
summary = reinforce.run(yaml.safe_load(open(sys.argv[1])))
print(json.dumps([summary.status, summary.quarantined_shards]))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder on a small disk, and a function that makes room on it.

    Without the permission to mount one, the size of the files that the worker can write is limited instead.
    """
    disk, limit = tmp_path / "disk", tmp_path / "limit"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        limit.write_text("20000")
        yield disk, limit.unlink
        return
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_ends_a_run_with_one_error_and_nothing_half_written(
    shards: Callable[..., str], tmp_path: Path, small_disk: tuple[Path, Callable[[], None]]
) -> None:
    disk, make_room = small_disk
    out = disk / "out"
    teachers = {
        "red": {"class": "tests.helpers.models:FileLimitTeacher", "options": {"limit": str(tmp_path / "limit")}}
    }
    config = config_of(shards(2, *[30] * 4), out, captioners={}, teachers=teachers)
    with pytest.raises(reinforce.UserError, match=r"cannot be written: .*make room in") as raised:
        reinforce.run(config)
    assert "\n" not in str(raised.value)
    assert not list(out.glob("quarantine/**/*.parquet")), "a full disk is not a fault of a shard"
    there = {name: data for name, data in tree(out).items() if name.endswith(".parquet")}
    assert 3 <= len(there) < 15

    make_room()
    with local_ray():
        assert reinforce.run(config).status == 0
    assert not list((out / ".tmp").glob("reinforce-*"))
    assert tree(out) == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))
    assert there.items() <= tree(out).items(), "the files on the full disk were complete"


@pytest.mark.slow
def test_a_worker_killed_by_the_memory_monitor_costs_no_shard(shards: Callable[..., str], tmp_path: Path) -> None:
    options = {"trigger": "thing 3 of shard 1", "failure": "memory", "once": str(tmp_path / "taken")}
    teachers = {"ill": {"class": "tests.helpers.models:FailingTeacher", "options": options}}
    config = config_of(shards(*[10] * 3), tmp_path / "out", captioners={}, teachers=teachers)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=1080, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0]
    lines = [line for path in tmp_path.glob("out/runs/*/events-*.jsonl") for line in path.read_text().splitlines()]
    died = [event for event in map(json.loads, lines) if event["event"] == "worker_died"]
    assert len(died) == 1
    assert "memory" in died[0]["error"]
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))
