"""Expansion of sources, canonical URLs, shard names, the state of source files, and folders that have moved."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.errors import UserError
from reinforce.source.references import (
    SourceState,
    current_url,
    former_urls,
    listed_state,
    moved_folders,
    probe_state,
    read_state,
)
from reinforce.source.urls import (
    Info,
    _canonical_urls,
    canonical,
    compression,
    expand,
    find_unreferable,
    is_public,
    shard_name,
    shard_names,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt.tar"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.tar").mkdir()
    return tmp_path


BRACES = {
    "s3://b/{08..11}.tar": ["s3://b/08.tar", "s3://b/09.tar", "s3://b/10.tar", "s3://b/11.tar"],
    "{8..10}": ["8", "9", "10"],
    "{2..0}": ["2", "1", "0"],
    "{0..6..3}": ["0", "3", "6"],
    "{a..c}": ["a", "b", "c"],
    "{a,b}/{0..1}.tar": ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"],
    "{x,{0..1}y,}z": ["xz", "0yz", "1yz", "z"],
    "{single}-{}-{0..1}": ["{single}-{}-0", "{single}-{}-1"],
    "{{0..1}}": ["{0}", "{1}"],
}


def test_braces_expand_as_in_a_shell_and_lists_keep_their_order_without_duplicates():
    assert {pattern: expand(pattern) for pattern in BRACES} == BRACES
    assert expand(["b.tar", "{a,b}.tar", "b.tar"]) == ["b.tar", "a.tar"]


def test_globs_match_sorted_files_and_keep_scheme_host_and_chain(folder):
    names = [f"{folder}/a.tar", f"{folder}/b.tar", f"{folder}/c.txt.tar"]
    assert expand(f"{folder}/*.tar") == names
    assert expand(f"file://{folder}/[ab].tar") == [f"file://{folder}/a.tar", f"file://{folder}/b.tar"]
    assert expand(f"{folder}/{{b,a}}.t?r") == [names[1], names[0]]
    fs = fsspec.filesystem("memory")
    fs.pipe({"/globs/y.tar": b"", "/globs/x.tar": b""})
    assert expand("memory://globs/*.tar") == ["memory://globs/x.tar", "memory://globs/y.tar"]
    assert expand("simplecache::memory://globs/x*") == ["simplecache::memory://globs/x.tar"]
    # A question mark in a web address is no glob.
    assert expand("https://host/a.tar?sig=[x]*") == ["https://host/a.tar?sig=[x]*"]


def test_a_text_file_lists_urls_relative_to_its_folder_on_disk_and_elsewhere(folder):
    lists = folder / "lists[1]"
    lists.mkdir()
    (lists / "more.txt").write_text("last.tar\n")
    (lists / "x1.tar").write_bytes(b"")
    text = "\ufeff# shards\r\n\r\ns3://b/{0..1}.tar\r\n  ../a.tar  \r\n/abs/c.tar\r\nx*.tar\r\nmore.txt\r\n"
    (lists / "shards.txt").write_bytes(text.encode())
    assert expand(f"{lists}/shards.txt") == [
        "s3://b/0.tar",
        "s3://b/1.tar",
        f"{lists}/../a.tar",
        "/abs/c.tar",
        f"{lists}/x1.tar",
        f"{lists}/last.tar",
    ]
    fsspec.filesystem("memory").pipe("/listed/shards.txt", b"a.tar\nsub/b.tar\n")
    assert expand("memory://listed/shards.txt") == ["memory://listed/a.tar", "memory://listed/sub/b.tar"]


NO_SOURCE = {
    "": "empty entry",
    "/nowhere/*.tar": "/nowhere/*.tar: no file matches",
    "/nowhere/list.txt": "/nowhere/list.txt: cannot read this list",
    "nosuch://b/*.tar": "nosuch",
    "s3://b/{0..9.tar": "brace is not closed",
    "{0..9..0}": "step",
    "{0..99999999}": "more than",
    "pipe:cat x.tar": "commands are not run",
    "ftp://me:secret@127.0.0.1:1/*.tar": "ftp://127.0.0.1:1/*.tar: cannot be listed",
}


def test_a_source_that_cannot_be_expanded_is_a_user_error_without_secrets(tmp_path):
    for source, message in NO_SOURCE.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            expand(source)
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="source is empty"):
        expand([])
    for content in (b"# nothing\n", b"\xff\xfe\x00", b"self.txt\n"):
        (tmp_path / "self.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"self\.txt"):
            expand(f"{tmp_path}/self.txt")


CANONICAL = {
    "s3://bucket/a/b.tar": "s3://bucket/a/b.tar",
    "S3://bucket/a.tar?versionId=1#x": "s3://bucket/a.tar",
    "https://me:pw@host:8/a.tar?token=1": "https://host:8/a.tar",
    "ftp://me@host/a.tar": "ftp://host/a.tar",
    "abfs://container@account.dfs.core.windows.net/a.tar": "abfs://container@account.dfs.core.windows.net/a.tar",
    "file:///data/../data/a#1.tar": "/data/a#1.tar",
    "simplecache::https://me:pw@host/a.tar": "https://host/a.tar",
    "zip://a.tar::s3://bucket/x.zip": "zip://a.tar::s3://bucket/x.zip",
}


def test_canonical_urls_have_no_secrets_and_absolute_paths_and_shard_names_are_stable(tmp_path, monkeypatch):
    assert {url: canonical(url) for url in CANONICAL} == CANONICAL
    assert {plain: canonical(plain) for plain in CANONICAL.values()} == {plain: plain for plain in CANONICAL.values()}
    monkeypatch.chdir(tmp_path)
    assert canonical("x/../a.tar") == f"{tmp_path}/a.tar"
    assert shard_name("a.tar") == shard_name(f"file://{tmp_path}/a.tar")
    assert shard_name("s3://bucket/dfn5b/00000007.tar") == "00000007-2e61a44594"


def test_shard_names_differ_between_folders_and_compressions():
    urls = expand(["s3://b/{a,b}/{0..1}.{tar,tar.gz,TGZ}", "gs://b/a/0.tar"])
    names = shard_names(urls)
    assert len(set(names)) == len(urls)
    assert {name.rpartition("-")[0] for name in names} == {"0", "1"}
    with pytest.raises(UserError, match="same shard name"):
        shard_names(["https://host/a.tar?part=1", "https://host/a.tar?part=2"])


@given(st.text(max_size=300))
def test_any_file_name_becomes_a_safe_shard_name(stem):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}-[0-9a-f]{10}", shard_name(f"s3://bucket/x/{stem}.tar.zst"))


FOLDERS = ["", "x", "./x/..", "~", "/data/x//y", "s3://bucket", "S3://me:pw@bucket/x", "http://h/p?a=/b", "s3:/"]
NAMES = ["a.tar", "..", ".", "", "a?b.tar", "a#b", "m@a.tar", "\xe4.tgz", "a.TAR.GZ\n", "a::b.tar"]


def test_many_urls_get_the_canonical_forms_of_single_ones():
    for folder, name in itertools.product([*FOLDERS, "http://h/p#/x"], NAMES):
        urls = [f"{folder}/0", f"{folder}/{name}", f"{folder}/b.tar", name, f"simplecache::{folder}/{name}"]
        assert list(_canonical_urls(urls)) == [canonical(url) for url in urls]
        assert [find_unreferable([f"{folder}/0.tar", url])[1] for url in urls] == [
            next((each for each in (f"{folder}/0.tar", url) if not is_public(each)), None) for url in urls
        ]
        packed = [find_unreferable(["a.tar", url])[0] for url in urls]
        assert packed == [url if compression(url) else None for url in urls]


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
    unknown = SourceState.from_footer({"rows": "3"})  # of labels, which name no source
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
