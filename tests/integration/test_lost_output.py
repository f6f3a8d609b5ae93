"""Output that vanishes during a run, on every kind of storage: the run writes it again before it ends."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest

import reinforce
from reinforce.dataset.claims import Claims
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.driver import driver
from reinforce.engine.driver.driver import Driver
from reinforce.errors import StorageError
from tests.helpers.data import config_of
from tests.helpers.reinforced import fresh_dataset

SHARDS, BEFORE = 6, 4  # shards, and those that are finished when files vanish


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://lost/out"
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/lost", recursive=True)


def files(output: str) -> dict[str, bytes]:
    """All files of a dataset but those of its runs and its index, and temporary ones."""
    store = Store(output)
    names = {path.removeprefix(f"{store.root}/"): path for path in store.fs.find(store.root)}
    kept = [name for name in names if not name.startswith(("runs", "index", "."))]
    return {name: store.fs.cat_file(names[name]) for name in kept}


def lose_once(monkeypatch: pytest.MonkeyPatch, action: Callable[[Store], Any]) -> None:
    """Call ``action`` when some shards are finished."""
    handle, done = Driver._handle_result, list[str]()

    def handle_and_lose(self: Driver, result: Any) -> None:
        handle(self, result)
        done.append(result.shard)
        if len(done) == BEFORE:
            action(self.store)

    monkeypatch.setattr(Driver, "_handle_result", handle_and_lose)


def lose_folders(store: Store) -> None:
    """A folder of a local disk is moved away, since workers may write to it while it is deleted."""
    for folder in ("samples", "embeddings"):
        lost = store.path(folder)
        if Path(lost).exists():
            lost = str(Path(lost).rename(f"{store.root}-{folder}"))
        store.fs.rm(lost, recursive=True)
    store.fs.rm_file(store.path(MANIFEST))


def lose_of_an_earlier_run(store: Store) -> None:
    store.fs.rm_file(store.path("samples", f"{store.shards('samples').names[0]}.parquet"))
    store.fs.rm_file(store.path(MANIFEST))


@pytest.mark.parametrize("storage", ["local", "memory"])
def test_layers_and_dataset_json_that_vanish_during_a_run_are_written_again(
    request: pytest.FixtureRequest,
    storage: str,
    memory: str,
    shards: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request.getfixturevalue("worker_in_process" if storage == "memory" else "ray_session")  # memory of one process
    output = memory if storage == "memory" else str(tmp_path / "out")
    config = config_of(shards(*[6] * SHARDS), output)
    whole = files(str(fresh_dataset({**config, "output": str(tmp_path / "whole")})))
    lose_once(monkeypatch, lose_folders)
    summary = reinforce.run(config)
    made = files(output)
    assert (summary.status, [*whole.keys() - made.keys()]) == (0, [])
    assert made == whole
    printed = capsys.readouterr().out
    assert f"{MANIFEST} is not there any more, and is written again" in printed
    assert re.search(r"embeddings/red/namer: [4-6] files are not there any more, such as 00000-", printed)


@pytest.mark.usefixtures("worker_in_process")
def test_what_earlier_runs_have_written_and_vanishes_is_written_again(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of a finished shard, and dataset.json with the layers of another config.

    The second pass has fewer shards than `workers.min`.
    """
    workers = {"batch": 16, "min": 2, "max": 2, "start_timeout": 30}
    config = config_of(shards(*[6] * SHARDS), tmp_path / "out", workers=workers)
    red, blue = ({**config, "teachers": {name: config["teachers"][name]}} for name in ("red", "blue"))
    for output in (tmp_path / "whole", tmp_path / "out"):
        fresh_dataset({**red, "output": str(output)})
    whole = files(str(fresh_dataset({**blue, "output": str(tmp_path / "whole")})))
    lose_once(monkeypatch, lose_of_an_earlier_run)
    assert reinforce.run(blue).status == 0
    assert files(str(tmp_path / "out")) == whole


@pytest.mark.usefixtures("worker_in_process")
def test_a_start_is_not_slow_where_the_storage_refuses_dataset_json(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, check = Mock(side_effect=[StorageError("refused."), None, None]), Driver._check_start
    monkeypatch.setattr(driver, "_MANIFEST_SECONDS", 0.1)
    monkeypatch.setattr(Claims, "publish", publish)
    monkeypatch.setattr(Driver, "_check_start", lambda self, waited: check(self, waited + 1e6 * publish.called))
    assert reinforce.run(config_of(shards(2), tmp_path / "out")).status == 0


@pytest.mark.usefixtures("worker_in_process")
def test_a_run_whose_output_vanishes_each_time_ends_with_status_1(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Driver._check_written

    def lose_and_check(self: Driver) -> None:
        for path in (tmp_path / "out" / "samples").glob("*.parquet"):
            path.unlink()
        lost(self)

    monkeypatch.setattr(Driver, "_check_written", lose_and_check)
    summary = reinforce.run(config_of(shards(6, 6), tmp_path / "out", captioners={}))
    assert (summary.status, summary.postponed) == (1, 2)
    assert "2 shards" in summary.message
    assert "not in the storage any more" in summary.message
