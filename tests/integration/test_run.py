"""Whole runs: the files they write, that nothing is computed twice, and their exit status."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import reinforce
from reinforce.dataset.index import read_index
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.driver.driver import Driver
from tests.helpers.commands import exit_status, printed_by
from tests.helpers.data import config_of, events_of, members_of, tree, write_tar
from tests.helpers.worker_in_process import worker_in_process


@pytest.mark.usefixtures("ray_session")
def test_a_run_reports_damaged_files_replaced_sources_and_repeated_keys_and_the_next_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """One damaged file is found by its size before the run, one when another layer is computed from it."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_tar(source / "0.tar", members_of(0, 5))
    whole = config_of(f"{source}/*.tar", out)
    with worker_in_process():
        first = reinforce.run({**whole, "teachers": {"red": whole["teachers"]["red"]}})
    assert (first.status, first.samples, first.shards, first.repeated_keys) == (0, 5, 1, 0)
    before = tree(out)
    time.sleep(1.1)  # the name of a run has its second
    [cut] = (out / "embeddings/red/images").iterdir()
    cut.write_bytes(cut.read_bytes()[:-9])
    [flipped] = (out / "captions/namer").iterdir()
    data = bytearray(flipped.read_bytes())
    data[pq.read_metadata(flipped).row_group(0).column(1).data_page_offset + 40] ^= 1
    flipped.write_bytes(data)
    write_tar(source / "0.tar", members_of(5, 3))
    for name, members in (("1", members_of(0, 4)), ("2", members_of(1, 2))):
        write_tar(source / f"{name}.tar", members)

    summary = reinforce.run(whole)
    assert (summary.status, summary.repeated_keys, len(summary.notes)) == (0, 4, 2), "the damaged files"
    text = summary.text(whole["output"])
    assert f"embeddings/red/images/{cut.name}: it is not a Parquet file, or it is cut off" in text
    assert f"captions/namer/{flipped.name}: a page " in text
    assert "moved to set-aside/ to be computed again" in text
    assert {path.parent.name for path in (out / "set-aside").rglob("*.parquet")} == {"images", "namer"}
    after = tree(out)
    assert {name: after[name] for name in before if name != "dataset.json"} == {
        name: content for name, content in before.items() if name != "dataset.json"
    }
    assert "1 of 1 shards that get new layers have changed since their samples were written (0-" in caplog.text
    repeated = "repeated keys: 4 keys, 57.14% of all, in more than one shard, for example in "
    assert repeated in text
    assert repeated in printed_by(capsys, "status", str(out))
    assert not any("record" in event for event in events_of(out, "shard"))
    store = Store(whole["output"])
    for name, entry in read_manifest(store)["layers"].items():
        assert dict(read_index(store, name, entry["fingerprint"]).listing().items()) == store.shards(name), name
    after = tree(out, layers_only=False)
    again = reinforce.run(whole)
    assert again.run is None
    assert "nothing to do" in again.message
    assert tree(out, layers_only=False) == after
    assert validate(whole["output"]).errors == []


def run(folder: Path, config: dict[str, Any]) -> int:
    """Run the command; return its exit status."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return exit_status("run", f"{folder}/config.yaml")


def summary(folder: Path) -> dict[str, Any]:
    """The summary.json of the only run."""
    [path] = (folder / "out" / "runs").glob("*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A good shard and one that does not exist."""
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 3))
    return f"{tmp_path}/source/{{0..1}}.tar"


@pytest.mark.usefixtures("ray_session", "own_fast_paths")
def test_a_finished_run_with_too_many_quarantined_shards_and_without_fast_paths(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = {"red": {"class": "tests.helpers.models:PathTeacher"}}
    config = config_of(source, tmp_path / "out", failures={"allowed_share": 0.4}, teachers=teachers)
    monkeypatch.setenv("REINFORCE_ACCELERATOR", "fats")
    assert run(tmp_path, config) == 2
    assert "REINFORCE_ACCELERATOR is 'fats' in the environment: set it to plain or fast" in capfd.readouterr().err
    monkeypatch.setenv("REINFORCE_ACCELERATOR", "plain")  # after Ray has started
    assert run(tmp_path, config) == 1
    assert (summary(tmp_path)["fast_paths"], summary(tmp_path)["notes"]) == ([], [])
    [stored] = (tmp_path / "out" / "runs").glob("*/config.yaml")
    assert yaml.safe_load(stored.read_text())["accelerator"] == "plain"
    assert summary(tmp_path)["status"] == 1
    [(reason, example)] = summary(tmp_path)["examples"].items()
    lines = capfd.readouterr().out.splitlines()
    assert f"  {reason}, for example {example}" in lines[-3:]
    assert reason == "shard_missing"
    again = exit_status("init", source, f"{tmp_path}/config.yaml", "--run")
    assert again == 1, "it continues the run of a config that exists, also when nothing is left to do"


@pytest.mark.usefixtures("worker_in_process")
def test_a_fault_of_all_shards_stops_the_run_before_it_quarantines_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "source" / "000.tar", members_of(0, 3))
    config = config_of(f"{tmp_path}/source/{{000..199}}.tar", tmp_path / "out", failures={"allowed_share": 0.05})
    assert run(tmp_path, config) == 1
    assert summary(tmp_path)["status"] == 1
    assert summary(tmp_path)["message"] in (err := capfd.readouterr().err)
    assert "stopped: 11 of 200 shards" in err
    assert "shard_missing: No such file or directory. Fix it and run with --retry-quarantined." in err
    assert len(list((tmp_path / "out" / "quarantine" / "samples").iterdir())) < 20


@pytest.mark.usefixtures("ray_session")
def test_a_run_that_a_defect_of_the_program_stops(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Driver, "_loop", fail)
    assert run(tmp_path, config_of(source, tmp_path / "out")) == 1
    assert (summary(tmp_path)["status"], summary(tmp_path)["message"]) == (
        1, "stopped by an error: ZeroDivisionError: a defect",
    )  # fmt: skip
