"""Real faults: killed processes, segfaults, wrong clocks, a full disk, memory that runs out. The files must equal those
of an undisturbed run byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import reinforce
from reinforce.dataset.runs import RunProgress, list_runs, running
from reinforce.engine.driver.failures import LoadLimit
from reinforce.source.urls import shard_name
from reinforce.storage import Storage
from tests.helpers.commands import json_of_process
from tests.helpers.data import config_of, events_of, members_of, tree, write_tar
from tests.helpers.reinforced import fresh_dataset
from tests.helpers.waiting import is_alive, processes_below, wait_for

ROOT = Path(__file__).parents[2]
LAST = "embeddings/red/caption"  # the layer that is committed last
SHARDS = 12


def simple_config(source: str, output: Path, **changes: Any) -> dict[str, Any]:
    changes = {"captioners": {}, "teachers": {"red": {"class": "tests.helpers.models:ColorTeacher"}}, **changes}
    return config_of(source, output, **changes)


@contextlib.contextmanager
def slow_run(config: dict[str, Any], folder: Path, delay: float = 0.15) -> Iterator[subprocess.Popen[str]]:
    """`reinforce run` in a process and a Ray of its own; shards have three batches of ``delay`` seconds each."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"TESTS_DELAY": str(delay)}
    command = [sys.executable, "-m", "reinforce", "run", str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finished(out: Path) -> int:
    return len(list((out / LAST).glob("*.parquet")))


def running_job(out: Path) -> RunProgress | None:
    """What `reinforce status` shows of a running job."""
    store = Storage(str(out))
    return running(store, list_runs(store))


def is_computing(out: Path, driver: int) -> bool:
    """Whether workers of a driver have shards."""
    now = running_job(out)
    return now is not None and now.pid == driver and any(worker.shards for worker in now.workers)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    for shard in range(SHARDS):
        write_tar(folder / f"{shard:05d}.tar", members_of(shard, 40))
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def undisturbed(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_dataset(simple_config(source, tmp_path_factory.mktemp("undisturbed") / "out"))


def check_stopped(process: subprocess.Popen[str], out: Path, sent: signal.Signals) -> str:
    """What a run printed that a signal has stopped."""
    output = process.communicate(timeout=1080)[0]
    assert process.returncode == 128 + sent, output
    assert "Run the same command again to resume" in output
    assert "Traceback" not in output
    [path] = (out / "runs").glob("*/summary.json")
    summary = json.loads(path.read_text())
    assert (summary["status"], summary["message"]) == (128 + sent, "stopped")
    return output


def check_resumes(config: dict[str, Any], out: Path, undisturbed: Path) -> None:
    check_correct(out, undisturbed)
    assert reinforce.run(config).status == 0
    assert tree(out) == tree(undisturbed)
    assert not list((out / ".tmp").glob("reinforce-*")), "no temporary file is left"


def check_correct(out: Path, undisturbed: Path) -> None:
    assert 1 <= finished(out) < SHARDS
    assert tree(out).items() <= tree(undisturbed).items(), "every committed file is correct"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_interrupted_run_resumes(source: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with slow_run(simple_config(source, out), tmp_path) as process:
        wait_for(lambda: finished(out) >= 2)
        process.send_signal(signal.SIGINT)
        check_stopped(process, out, signal.SIGINT)
    check_resumes(simple_config(source, out), out, undisturbed)


@pytest.mark.usefixtures("ray_session")
def test_a_run_resumes_after_its_worker_its_driver_and_its_ray_were_killed_and_it_was_terminated(
    source: str, undisturbed: Path, tmp_path: Path
) -> None:
    """Three processes, each of which resumes what the one before has left, and the run that ends it."""
    out, config = tmp_path / "out", simple_config(source, tmp_path / "out")
    with slow_run(config, tmp_path, delay=0.7) as process:
        wait_for(lambda: finished(out) >= 1 and events_of(out, "worker_started"))
        with pytest.raises(reinforce.UserError, match="another run is writing"):
            reinforce.run(config)
        wait_for(lambda: (now := running_job(out)) and now.workers)
        now = running_job(out)
        assert (now.pid, now.shards, now.silent_for()) == (process.pid, SHARDS, None)
        assert {worker.pid for worker in now.workers} <= {event["pid"] for event in events_of(out, "worker_started")}
        assert all(Path(worker.log).is_file() for worker in now.workers)
        assert all(lease.shard.startswith("0000") for worker in now.workers for lease in worker.shards)
        os.kill(events_of(out, "worker_started")[0]["pid"], signal.SIGKILL)
        wait_for(lambda: events_of(out, "worker_died"))
        before = finished(out)
        wait_for(lambda: finished(out) > before)
        process.send_signal(signal.SIGTERM)
        output = check_stopped(process, out, signal.SIGTERM)
    assert running_job(out) is None
    assert "a worker died" in output
    assert [event["node_lost"] for event in events_of(out, "worker_died")] == [False]
    check_correct(out, undisturbed)

    with slow_run(config, tmp_path, delay=2.0) as process:  # no more shards end, so that enough are left
        wait_for(lambda: is_computing(out, process.pid))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(1.0)  # until the workers notice that their driver is gone
    check_correct(out, undisturbed)

    runs = {*out.glob("runs/*")}
    with slow_run(config, tmp_path, delay=2.0) as process:
        wait_for(lambda: is_computing(out, process.pid))
        [raylet] = processes_below(process.pid, "raylet")
        os.kill(raylet, signal.SIGKILL)
        output = process.communicate(timeout=600)[0]
    assert process.returncode == 1, output
    assert output.count("Ray ended on this machine before the run did") == 1
    assert "are kept" in output
    assert "Run the same command again to resume" in output
    assert "Traceback" not in output
    [run] = {*out.glob("runs/*")} - runs
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == 1
    assert "Ray ended" in summary["message"]
    check_resumes(config, out, undisturbed)


@pytest.mark.usefixtures("worker_in_process")
def test_only_the_monotonic_clock_affects_a_run(
    source: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock jumps by years at each call, and files have dates in the past and in the future."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    removed = sorted(out.rglob("*.parquet"))[::5]
    for path in removed:
        path.unlink()
    for number, path in enumerate(sorted(path for path in out.rglob("*") if path.is_file())):
        os.utime(path, (number % 2 * 2**32, number % 2 * 2**32))
    years = itertools.cycle((0, 1, -1, 50, -50))
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 31_557_600 * next(years))
    assert reinforce.run(simple_config(source, out)).status == 0
    monkeypatch.undo()
    assert tree(out) == tree(undisturbed)


@pytest.mark.usefixtures("ray_session")
def test_single_failures_leave_no_trace_and_lasting_ones_cost_a_shard_or_the_layers_of_a_model(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    source, out = shards(*[10] * 5), tmp_path / "out"
    repaired = tmp_path / "repaired"
    failing: dict[str, dict[str, Any]] = {
        "raises": {"trigger": "thing 3 of shard 0", "failure": "raise", "once": str(tmp_path / "raised")},
        "dies": {"trigger": "thing 3 of shard 1", "failure": "kill", "once": str(tmp_path / "died")},
        "faults": {"trigger": "thing 7 of shard 2", "failure": "segfault", "until": str(repaired)},
        "ill": {"trigger": "of shard 3", "failure": "raise", "until": str(repaired)},
        "exits": {"trigger": "of shard 4", "failure": "exit", "until": str(repaired)},
    }
    teachers = {
        name: {"class": "tests.helpers.models:FailingTeacher", "options": options} for name, options in failing.items()
    }
    failures = {"attempts": 2, "allowed_share": 1.0}
    config = config_of(source, out, captioners={}, teachers=teachers, failures=failures)
    summary = reinforce.run(config)
    assert (summary.status, summary.quarantined_shards, summary.shards, summary.samples) == (0, 3, 5, 40)
    assert (tmp_path / "raised").exists()
    assert (tmp_path / "died").exists()
    assert not list((out / ".tmp").glob("reinforce-*")), "no temporary file of a worker that died is left"
    raised = Counter(event["shard"].partition("-")[0] for event in events_of(out, "shard_raised"))
    assert raised.keys() <= {"00000", "00003", "00004"}
    assert raised["00000"] <= 1, "none if its worker dies of another shard at that moment"
    assert len(events_of(out, "worker_died")) >= 1 + 2, "one that died once, one that died alone twice"
    bad, ill, exits = (shard_name(f"{tmp_path}/source/{number}.tar") for number in ("00002", "00003", "00004"))
    assert {(event["shard"], event["layer"], event["reason"]) for event in events_of(out, "shard_quarantined")} == {
        (bad, "samples", "shard_crashed"), (ill, "embeddings/ill/caption", "shard_failed"),
        (exits, "embeddings/exits/caption", "shard_failed"),
    }  # fmt: skip
    repaired.touch()
    there, whole = tree(out), tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))
    assert there.keys() - whole.keys() == {
        f"quarantine/samples/{bad}.parquet", f"quarantine/embeddings/ill/caption/{ill}.parquet",
        f"quarantine/embeddings/exits/caption/{exits}.parquet",
    }  # fmt: skip
    assert {name for name in whole.keys() - there.keys() if bad not in name} == {
        f"embeddings/ill/caption/{ill}.parquet",
        f"embeddings/exits/caption/{exits}.parquet",
    }
    assert all(there[name] == data for name, data in whole.items() if name in there)
    assert reinforce.run(config, retry_quarantined=True).status == 0
    assert tree(out) == whole


@pytest.mark.usefixtures("ray_session")
def test_a_worker_at_which_every_lease_fails_is_replaced_and_no_shard_is_quarantined(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(*[10] * 8), tmp_path / "out", captioners={})
    config["workers"] = {"batch": 16, "max": 1}
    options = {"trigger": "thing 3 of shard 1", "once": str(tmp_path / "flag")}
    config["teachers"] = {"ill": {"class": "tests.helpers.models:BrokenDeviceTeacher", "options": options}}
    summary = reinforce.run(config)
    assert (summary.status, summary.quarantined_shards, summary.samples) == (0, 0, 80)
    assert len(events_of(tmp_path / "out", "worker_replaced")) == 1


@pytest.mark.usefixtures("ray_session")
def test_workers_that_hang_while_they_load_models_are_replaced_and_three_in_a_row_end_the_run(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four loads wait for their limit, which here must be longer than a load on a busy machine."""
    monkeypatch.setattr(LoadLimit, "seconds", 10.0)  # workers.start_timeout also limits the start
    out, used, once = tmp_path / "out", tmp_path / "used", tmp_path / "once"
    options = {"used": str(used), "once": str(once)}
    config = config_of(shards(*[10] * 3), out, captioners={})
    config["workers"] = {"batch": 16, "max": 1, "recycle": 1}
    config["teachers"] = {"slow": {"class": "tests.helpers.models:HangingLoadTeacher", "options": options}}
    with pytest.raises(reinforce.UserError, match=r"3 in a row were killed, the last one pid \d+ on ") as raised:
        reinforce.run(config)
    assert "\n" not in str(raised.value)
    hung = [event["pid"] for event in events_of(out, "worker_failed_to_start")]
    assert len({*hung}) == 3
    wait_for(lambda: not any(map(is_alive, hung)), seconds=60)
    assert (out / "dataset.json").exists()
    used.unlink()
    once.touch()
    summary = reinforce.run(config)
    assert (summary.status, summary.samples, summary.quarantined_shards) == (0, 20, 0)
    assert len(events_of(out, "worker_failed_to_start")) == 3 + 1


DISK_BYTES = 300_000  # room for the first few shards

#: A run on a Ray of its own, whose memory monitor allows 4 GiB more than are in use now: other tests take some of it.
LITTLE_MEMORY = """
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
    assert json_of_process(LITTLE_MEMORY, path) == [0, 0]
    [died] = events_of(tmp_path / "out", "worker_died")
    assert "memory" in died["error"]
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))
