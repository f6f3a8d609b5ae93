"""The state of source files, and folders that have moved."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.errors import UserError
from reinforce.source.identity import (
    SourceState,
    current_url,
    former_urls,
    listed_state,
    moved_folders,
    probe_state,
    read_state,
)
from reinforce.source.urls import Info, canonical, expand


def test_a_copied_file_has_the_same_footer_and_a_changed_one_has_not(tmp_path: Path) -> None:
    first, copy, longer, changed = (tmp_path / name for name in ("a", "b", "c", "d"))
    data = bytes(range(256)) * 300
    first.write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/identity/b", data)
    longer.write_bytes(data + b"x")
    changed.write_bytes(b"x" + data[1:])
    state = read_state(str(first))
    assert state.bytes == len(data)
    assert SourceState.from_footer(state.footer()).same_content(state)
    assert read_state("memory://identity/b").footer() == state.footer()
    assert [read_state(str(path)).same_content(state) for path in (longer, changed)] == [False, False]
    assert not copy.exists()
    assert probe_state(str(copy)) is None
    unknown = SourceState.from_footer({"rows": "3"})  # of an earlier version
    assert unknown.footer() == {}
    assert state.same_content(unknown) is None


def test_shards_of_a_moved_folder_are_named_after_the_former_one() -> None:
    moved = {"s3://new": "s3://old/data/", "/mnt/b": "/mnt/a"}
    urls = ["s3://new/x/0.tar", "/mnt/b/0.tar", "s3://newer/0.tar"]
    assert former_urls(urls, moved) == ["s3://old/data/x/0.tar", "/mnt/a/0.tar", "s3://newer/0.tar"]
    assert current_url("s3://old/data/x/0.tar", moved) == "s3://new/x/0.tar"
    assert current_url("s3://old/database/0.tar", moved) == "s3://old/database/0.tar"
    with pytest.raises(UserError, match=r"moved: no shard of `source` is in /mnt/b"):
        former_urls(urls[:1], moved)


folders = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


@given(st.sampled_from(["/", "s3://x/", "https://h.org/"]), folders, st.sampled_from(["/", "gs://y/"]), folders)
def test_found_folders_map_the_file_back(new_root: str, new: str, old_root: str, old: str) -> None:
    now, before = f"{new_root}{new}/0.tar", f"{old_root}{old}/0.tar"
    moved = moved_folders([(now, before)])
    assert [canonical(url) for url in former_urls([now], moved)] == [before]
    assert current_url(before, moved) == now


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_listing_shows_the_state_of_the_file(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = str(tmp_path) if place == "disk" else "s3://bucket/identity"
    fs = fsspec.filesystem("file") if place == "disk" else request.getfixturevalue("s3")
    for name, data in (("a.tar", b"x" * 100_000), ("b.tar", b"")):
        fs.pipe_file(f"{folder}/{name}", data)
    listed: dict[str, Info] = {}
    for url in expand(f"{folder}/*.tar", listed):
        state, found = read_state(url), listed_state(listed[url])
        assert (found.bytes, found.stamp) == (state.bytes, state.stamp)
        assert found.stamp is not None
        assert found.same_content(state) is None, "the content is not listed"
    assert len(listed) == 2
