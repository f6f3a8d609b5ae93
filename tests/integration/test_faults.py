"""Faults that are done for real; the end state is compared byte for byte with an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import reinforce
from reinforce.urls import shard_name
from tests.conftest import config_of, members_of, tree, write_tar

ROOT = Path(__file__).parents[2]


def slow_config(source: str, output: Path, delay: float = 0.15) -> dict[str, Any]:
    config = config_of(source, output, captioners={})
    config["teachers"] = {"red": {"class": "tests.models:Colour", "options": {"delay": delay}}}
    return config


def start(config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "reinforce", "run", str(path)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_files(folder: Path, count: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while len(list(folder.glob("*.parquet"))) < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    for shard in range(8):
        write_tar(folder / f"{shard:05d}.tar", members_of(shard, 40))
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def undisturbed(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(slow_config(source, folder / "out"), folder).wait(90) == 0
    return tree(folder / "out")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_whose_driver_is_killed_goes_on_where_it_was(
    source: str, undisturbed: dict[str, bytes], tmp_path: Path, sent: signal.Signals
) -> None:
    config = slow_config(source, tmp_path / "out")
    process = start(config, tmp_path)
    wait_for_files(tmp_path / "out" / "embeddings" / "red" / "caption", 2)
    process.send_signal(sent)
    output = process.communicate(timeout=240)[0]
    if sent == signal.SIGTERM:
        assert process.returncode == 130, output
        assert "run again to go on" in output
        assert "Traceback" not in output
    done = len(list((tmp_path / "out" / "embeddings" / "red" / "caption").glob("*.parquet")))
    assert 2 <= done < 8
    time.sleep(1.0 if sent == signal.SIGKILL else 0.0)  # workers notice that their driver is gone

    again = start(config, tmp_path)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert tree(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out" / ".tmp").glob("reinforce-*")), "nothing half written is left"


def test_a_run_loses_nothing_when_a_worker_is_killed(
    source: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(slow_config(source, tmp_path / "out"), tmp_path)
    wait_for_files(tmp_path / "out" / "samples", 1)
    victims = subprocess.run(["pgrep", "-f", "ray::Worker"], capture_output=True, text=True, check=False)
    mine = [int(p) for p in victims.stdout.split() if _descends(int(p), process.pid)]
    assert mine, victims
    os.kill(mine[0], signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "a worker died" in output
    assert tree(tmp_path / "out") == undisturbed


def _descends(pid: int, ancestor: int) -> bool:
    """Whether the Ray that ``ancestor`` started holds ``pid`` (its session folder stands in the environment)."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_kills_its_process_every_time_is_quarantined_and_its_neighbours_finish(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    source = shards(*[10] * 5)
    config = config_of(source, tmp_path / "out", captioners={})
    config["teachers"] = {
        "ill": {"class": "tests.models:Trouble", "options": {"word": "thing 7 of shard 2", "harm": "kill"}}
    }
    summary = reinforce.run(config)
    assert (summary.quarantined_shards, summary.shards) == (1, 5)
    bad = shard_name(f"{tmp_path}/source/00002.tar")
    done = {p.stem for p in (tmp_path / "out" / "embeddings" / "ill" / "caption").glob("*.parquet")}
    assert len(done) == 4
    assert bad not in done
    assert (tmp_path / "out" / "quarantine" / "samples" / f"{bad}.parquet").exists()


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_always_raises_costs_its_own_layers_only(shards: Callable[..., str], tmp_path: Path) -> None:
    source = shards(*[10] * 3)
    config = config_of(source, tmp_path / "out", captioners={})
    config["failures"] = {"attempts": 2, "allowed_share": 1.0}
    config["teachers"]["ill"] = {
        "class": "tests.models:Trouble",
        "options": {"word": "of shard 1", "harm": "raise"},
    }
    summary = reinforce.run(config)
    assert (summary.status, summary.quarantined_shards) == (0, 1)
    name = shard_name(f"{tmp_path}/source/00001.tar")
    out = tmp_path / "out"
    assert (out / "quarantine" / "embeddings" / "ill" / "caption" / f"{name}.parquet").exists()
    assert not (out / "embeddings" / "ill" / "caption" / f"{name}.parquet").exists()
    for layer in ("samples", "embeddings/red/images", "embeddings/red/caption", "embeddings/ill/images"):
        assert len(list((out / layer).glob("*.parquet"))) == 3, layer


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("harm", ["raise", "kill"])
def test_a_fault_that_passes_leaves_no_trace(shards: Callable[..., str], tmp_path: Path, harm: str) -> None:
    source = shards(*[10] * 4)

    def config(output: str, once: str) -> dict[str, Any]:
        made = config_of(source, tmp_path / output, captioners={})
        made["teachers"] = {
            "ill": {
                "class": "tests.models:Trouble",
                "options": {"word": "thing 3 of shard 1", "harm": harm, "once": str(tmp_path / once)},
            }
        }
        return made

    summary = reinforce.run(config("out", "flag"))
    assert (summary.status, summary.quarantined_shards) == (0, 0)
    assert (tmp_path / "flag").exists(), "the fault did happen"
    reinforce.run({**config("whole", "flag")})
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.usefixtures("ray_session")
def test_a_worker_at_which_everything_fails_is_replaced_and_costs_no_shard(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(*[10] * 8), tmp_path / "out", captioners={})
    config["workers"] = {"batch": 16, "max": 1}
    options = {"word": "thing 3 of shard 1", "once": str(tmp_path / "flag")}
    config["teachers"] = {"ill": {"class": "tests.models:Poisoned", "options": options}}
    summary = reinforce.run(config)
    assert (summary.status, summary.quarantined_shards, summary.samples) == (0, 0, 80)
    events = "".join(path.read_text() for path in tmp_path.glob("out/runs/*/events-*.jsonl"))
    assert events.count('"worker_replaced"') == 1


def test_a_second_run_on_the_same_dataset_is_refused_and_ctrl_c_ends_the_first(source: str, tmp_path: Path) -> None:
    config = slow_config(source, tmp_path / "out", delay=0.1)
    first = start(config, tmp_path)
    wait_for_files(tmp_path / "out" / "samples", 1)
    with pytest.raises(reinforce.UserError, match="another run is writing"):
        reinforce.run(config)
    first.send_signal(signal.SIGINT)
    assert "run again to go on" in first.communicate(timeout=240)[0]
    assert first.returncode == 130
