"""A view is one commit of one selection at a time, is covered by digests, and knows what it was made of."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import s3fs

import reinforce
from reinforce.dataset import view as views
from reinforce.dataset.index import states_of
from reinforce.dataset.status import read_status
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.dataset.view import ViewRows, read_view, shard_rows
from reinforce.errors import UserError
from reinforce.explore import passes, select
from reinforce.explore import select as lock
from reinforce.source.config import Input
from reinforce.source.formats.base import Shard
from reinforce.source.formats.dataset import FORMAT
from reinforce.source.parquet_file import RefusedFile
from tests.helpers.reinforced import rewrite
from tests.helpers.views import make_view
from tests.helpers.waiting import wait_for

FLIPS = 60  # of each file; each is found


@pytest.fixture
def url(copy: Path) -> str:
    return str(copy)


def kept(url: str) -> list[str]:
    shard_rows.cache_clear()
    return [sample.key for sample in reinforce.open(url, view="some")]


def state(url: str) -> views.ViewState:
    [found] = read_status(url)["views"]
    return found


def kill(patched: pytest.MonkeyPatch, target: object, name: str) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    patched.setattr(target, name, killed)


@pytest.mark.parametrize(
    "target", [(ViewRows, "write"), (passes.WriteRows, "result"), (Store, "write_json"), (views, "remove_leftovers")]
)
def test_a_view_is_the_earlier_or_the_new_one_wherever_a_selection_is_killed(
    url: str, target: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = len(reinforce.open(url))
    make_view(url, {"sample": 7})
    earlier = kept(url)
    with monkeypatch.context() as patched:
        kill(patched, *target)
        with pytest.raises(KeyboardInterrupt):
            make_view(url, {"where": "width > 0"})
    assert len(reinforce.open(url, view="some")) == len(kept(url))
    assert len(kept(url)) == (every if target[1] == "remove_leftovers" else len(earlier))
    assert state(url).problems == ()
    make_view(url, {"where": "width > 0"})
    assert len(kept(url)) == every
    assert sorted(path.name.partition("-")[0] for path in Path(url, "views/some").iterdir()) == [
        "rows",
        "shards",
        "view.json",
    ]


def read_as_source(url: str) -> list[str]:
    fingerprint = views.read_view(Store(url), "some").fingerprint
    files = sorted(Path(url, "samples").iterdir())
    items = [
        item
        for file in files
        for item in FORMAT.items(Shard(str(file), file.stem, "dataset"), Input(view=f"some@{fingerprint}"))
    ]
    if any(item.key is None for item in items):
        raise RefusedFile("a shard is refused")
    return [str(item.key) for item in items]


@pytest.mark.parametrize("read", [kept, read_as_source])
def test_every_flipped_bit_of_rows_and_of_their_digests_is_found(url: str, read: Callable[[str], list[str]]) -> None:
    make_view(url, {"sample": 20})
    assert len(read(url)) == 20
    rng = random.Random(0)
    files = [next(Path(url, "views/some").glob(name)) for name in ("rows-*/*", "shards-*")]
    for path in files:
        content = path.read_bytes()
        for _ in range(FLIPS):
            bit = rng.randrange(8 * len(content))
            path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
            with pytest.raises((UserError, RefusedFile)):
                read(url)
        path.write_bytes(content)


def exchange_vectors(path: Path) -> None:
    """Replace a file by one of the same size, with the same keys and the vectors of other rows.

    A checksum takes 4 or 5 bytes, so that not each order of the vectors has that size.
    """
    content, rows = path.read_bytes(), pq.read_metadata(path).num_rows

    def turned(by: int, table: pa.Table) -> pa.Table:
        order = pa.array([*range(by, rows), *range(by)])
        index = table.column_names.index("embeddings")
        return table.set_column(index, table.schema.field(index), table["embeddings"].take(order))

    for by in range(1, rows):
        rewrite(path, partial(turned, by))
        if path.stat().st_size == len(content):
            return
        path.write_bytes(content)
    raise AssertionError("no order of the vectors has the size of the file")


DEDUPLICATE = {"deduplicate": {"teacher": "red", "threshold": 0.97}}


def vectors_file(url: str) -> Path:
    return sorted(Path(url, "embeddings/red/images").iterdir())[0]


def test_a_shard_that_is_replaced_in_place_makes_the_view_stale_and_a_copy_does_not(url: str, tmp_path: Path) -> None:
    rewrite(vectors_file(url), lambda table: table)
    view = make_view(url, DEDUPLICATE)
    shutil.copytree(url, tmp_path / "copy", copy_function=shutil.copy)  # with other times
    assert state(str(tmp_path / "copy")).problems == ()
    assert kept(str(tmp_path / "copy")) == kept(url)
    exchange_vectors(vectors_file(url))
    [problem] = state(url).problems
    assert "1 shard has other content, or no file, in samples, embeddings/red/images" in problem
    assert vectors_file(url).stem in problem
    with pytest.raises(UserError, match=r"has other content.* Make it again with reinforce select"):
        reinforce.open(url, view="some")
    assert "view some is refused: 1 shard has other content" in validate(url).code[-1]
    again = make_view(url, DEDUPLICATE)
    assert again.fingerprint != view.fingerprint
    assert state(url).problems == ()


def test_columns_that_no_rule_reads_may_change(url: str) -> None:
    [samples, *_] = sorted(Path(url, "samples").iterdir())
    rewrite(samples, lambda table: table)
    make_view(url, "width > 0", name="wide")
    make_view(url, "caption != ''", name="described")
    rewrite(samples, lambda table: table.set_column(1, table.schema.field(1), pc.utf8_upper(table["caption"])))
    found = {view.name: len(view.problems) for view in read_status(url)["views"]}
    assert found == {"wide": 0, "described": 1}


def test_parts_of_files_that_have_changed_are_thrown_away(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(vectors_file(url), lambda table: table)
    with monkeypatch.context() as patched:
        kill(patched, ViewRows, "write")
        with pytest.raises(KeyboardInterrupt):
            make_view(url, DEDUPLICATE)
    [parts] = Path(url, "views/some").glob("parts-*")
    exchange_vectors(vectors_file(url))
    lines: list[str] = []
    view = make_view(url, DEDUPLICATE, log=lines.append)
    assert "results of a selection of other rules or files, which was stopped, are removed" in lines
    assert not parts.exists()
    shutil.rmtree(Path(url, "views"))
    assert make_view(url, DEDUPLICATE) == view


def test_a_file_that_changes_during_a_selection_is_an_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(vectors_file(url), lambda table: table)
    make_view(url, {"sample": 7})
    earlier = kept(url)
    write = ViewRows.write

    def changed(self: ViewRows, *args: object) -> int:
        exchange_vectors(vectors_file(url))
        return write(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ViewRows, "write", changed)
        with pytest.raises(UserError, match="have changed since this selection began"):
            make_view(url, DEDUPLICATE)
    assert kept(url) == earlier
    assert not [*Path(url, "views/some").glob("parts-*")]
    assert len([*Path(url, "views/some").glob("rows-*")]) == 1


def test_a_reader_between_description_and_shards_reads_the_new_view(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_view(url, {"sample": 7})
    read_shards, made = views._read_shards, []

    def replaced(*args: Any) -> pa.Table:
        if not made:
            made.append(True)
            make_view(url, {"sample": 5})
        return read_shards(*args)

    monkeypatch.setattr(views, "_read_shards", replaced)
    assert len(views.read_view(Store(url), "some")) == 5
    next(Path(url, "views/some").glob("shards-*")).unlink()
    with pytest.raises(UserError, match=r"view\.json has no file of shards any more\. Make the view again"):
        views.read_view(Store(url), "some")


OTHER_PROCESS = 2**22 + 1  # above the largest number of a process


@pytest.fixture(params=["disk", "s3"])
def stored(copy: Path, request: pytest.FixtureRequest) -> str:
    if request.param == "disk":
        return str(copy)
    s3 = request.getfixturevalue("s3")
    s3.put(f"{copy}/", "bucket/out/", recursive=True)
    return "s3://bucket/out"


def test_a_second_selection_is_refused_without_harm_to_the_first(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write, made = ViewRows.write, []

    def waiting(self: ViewRows, *args: Any) -> int:
        begun.set()
        assert go_on.wait(60)
        return write(self, *args)

    monkeypatch.setattr(ViewRows, "write", waiting)
    thread = threading.Thread(target=lambda: made.append(make_view(stored, {"sample": 7})))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(UserError, match=rf"another selection is making view some of {stored} \(pid {os.getpid()} on"):
        make_view(stored, {"sample": 5})
    monkeypatch.setattr(ViewRows, "write", write)
    make_view(stored, {"sample": 3}, name="other")
    go_on.set()
    thread.join()
    assert [len(view) for view in made] == [7]
    assert len([*reinforce.open(stored, view="some")]) == 7
    assert len(make_view(stored, {"sample": 5})) == 5


def test_the_claim_of_a_selection_that_was_killed_is_taken(labelled: str, s3: s3fs.S3FileSystem) -> None:
    s3.put(f"{labelled}/", "bucket/claimed/", recursive=True)
    url, path = "s3://bucket/claimed", "bucket/claimed/views/some/selection.json"

    def claim(**changes: Any) -> None:
        content = {"token": "1", "host": socket.gethostname(), "pid": OTHER_PROCESS, "time": time.time(), **changes}
        s3.pipe_file(path, json.dumps(content).encode())

    claim(host="elsewhere")
    with pytest.raises(UserError, match=rf"another selection .* \(pid {OTHER_PROCESS} on elsewhere\). Wait until it"):
        make_view(url, {"sample": 5})
    for changes in ({}, {"host": "elsewhere", "time": time.time() - 1000}):
        claim(**changes)
        assert len(make_view(url, {"sample": 5})) == 5
        assert not s3.exists(path)


def test_a_selection_whose_claim_was_taken_writes_no_view(
    labelled: str, s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(f"{labelled}/", "bucket/taken/", recursive=True)
    states = states_of

    def takes_the_claim(*args: Any) -> Any:
        s3.pipe_file("bucket/taken/views/some/selection.json", json.dumps({"token": "another"}).encode())
        return states(*args)

    monkeypatch.setattr(select, "states_of", takes_the_claim)
    with pytest.raises(UserError, match="another selection is making view some"):
        make_view("s3://bucket/taken", {"sample": 5})
    assert not s3.exists("bucket/taken/views/some/view.json")
    assert s3.exists("bucket/taken/views/some/selection.json")


def test_a_claim_is_renewed_while_a_selection_runs(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEWED", 0.1)
    store = Store("s3://bucket/renewed")
    with lock.lock_view(store, "some") as check:
        first = s3.cat_file("bucket/renewed/views/some/selection.json")
        wait_for(lambda: s3.cat_file("bucket/renewed/views/some/selection.json") != first, seconds=30)
        check()
    assert not s3.exists("bucket/renewed/views/some/selection.json")


def test_a_view_in_an_object_store_equals_that_on_disk(labelled: str, s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "out")
    here = make_view(tmp_path / "out", {"deduplicate": {"teacher": "red", "threshold": 0.97}})
    s3.put(f"{labelled}/", "bucket/equal/", recursive=True)
    url = "s3://bucket/equal"
    assert make_view(url, *here.rules).fingerprint == here.fingerprint
    assert read_status(url)["views"][0].problems == ()
    s3.put(f"{tmp_path}/out/views/", "bucket/equal/views/", recursive=True)  # other states, the same content
    assert read_view(Store(url), "some").files == here.files
    assert read_status(url)["views"][0].problems == ()
    [first, second, *_] = sorted(s3.ls("bucket/equal/embeddings/red/images"))
    s3.copy(second, first)
    [problem] = read_status(url)["views"][0].problems
    assert f"since view some was made ({Path(first).stem})" in problem
