"""Two selections of one name, on a disk and in an object store, and views in an object store."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import s3fs

import reinforce
from reinforce.dataset.files.content import states_of
from reinforce.dataset.files.store import Store
from reinforce.dataset.status import read_status
from reinforce.dataset.view import ViewRows, read_view
from reinforce.errors import UserError
from reinforce.selection import lock, select
from tests.helpers.views import make_view
from tests.helpers.waiting import wait_for

OTHER_PROCESS = 2**22 + 1  # above the largest number of a process


@pytest.fixture(params=["disk", "s3"])
def url(copy: Path, request: pytest.FixtureRequest) -> str:
    if request.param == "disk":
        return str(copy)
    s3 = request.getfixturevalue("s3")
    s3.put(f"{copy}/", "bucket/out/", recursive=True)
    return "s3://bucket/out"


def test_a_second_selection_is_refused_without_harm_to_the_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write, made = ViewRows.write, []

    def waiting(self: ViewRows, *args: Any) -> int:
        begun.set()
        assert go_on.wait(60)
        return write(self, *args)

    monkeypatch.setattr(ViewRows, "write", waiting)
    thread = threading.Thread(target=lambda: made.append(make_view(url, {"sample": 7})))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(UserError, match=rf"another selection is making view some of {url} \(pid {os.getpid()} on"):
        make_view(url, {"sample": 5})
    monkeypatch.setattr(ViewRows, "write", write)
    make_view(url, {"sample": 3}, name="other")
    go_on.set()
    thread.join()
    assert [len(view) for view in made] == [7]
    assert len([*reinforce.open(url, view="some")]) == 7
    assert len(make_view(url, {"sample": 5})) == 5


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
