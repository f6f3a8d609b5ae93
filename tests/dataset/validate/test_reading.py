"""What `reinforce validate` reads, and hashes of keys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.dataset.files.content import digest_keys, hash_keys
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.validate.shard_reader import ShardReader
from reinforce.dataset.validate.validate import validate
from reinforce.errors import UserError
from tests.helpers.commands import printed_by
from tests.helpers.data import members_of, write_tar
from tests.helpers.reinforced import small_dataset

RED = "embeddings/red/images"


def test_an_object_store_is_asked_once_for_a_small_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for path in made.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/validated/{path.relative_to(made)}", path.read_bytes())
    monkeypatch.setattr(type(fs), "open", lambda self, path, *rest, **_: pytest.fail(f"{path} was opened"))
    for quick in (True, False):
        with mock.patch.object(type(fs), "cat_file", autospec=True, side_effect=type(fs).cat_file) as asked:
            assert validate("memory://validated", quick=quick).errors == []
        paths = [call.args[1] for call in asked.call_args_list]
        layers = [path for path in paths if "/index/" not in path and not path.endswith("dataset.json")]
        assert sorted(layers) == sorted(
            path for path in fs.find("/validated") if path.endswith(".parquet") and "/index/" not in path
        )


def test_a_file_that_was_replaced_after_it_was_listed_is_read_as_it_is(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings = Store.listings

    def listed(store: Store, *rest: Any) -> dict[str, Listing]:
        return {name: Listing(found.names, found.sizes + 7) for name, found in listings(store, *rest).items()}

    monkeypatch.setattr(Store, "listings", listed)
    assert validate(str(dataset), quick=True).errors == []


def test_a_sample_of_shards_is_read_and_all_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = small_dataset(tmp_path, sizes=(1,) * 6)
    shards = [*Store(url).shards("samples")]
    read: list[set[str]] = []
    for seed in (1, 1, 2):
        with mock.patch.object(Store, "layer_end", autospec=True, side_effect=Store.layer_end) as opened:
            assert validate(url, quick=True, sample=2, seed=seed).valid
        read.append({call.args[2] for call in opened.call_args_list})
    assert [len(opened) for opened in read] == [2, 2, 2]
    assert read[0] == read[1] != read[2]
    out = printed_by(capsys, "validate", url, "--sample", "2", "--seed", "1")
    assert f"{url}: all 6 shards were listed and 2 random ones were read, among which repeated keys were" in out
    for shard in shards:
        path = Path(url, RED, f"{shard}.parquet")
        path.write_bytes(path.read_bytes()[:-50])
    Path(url, "captions", "namer", f"{shards[0]}.parquet").unlink()
    Path(url, "samples", f"{shards[5]}.parquet").write_bytes(b"")
    report = json.loads(printed_by(capsys, "validate", url, "--sample", "2", "--json", status=1))
    assert (report["shards"], report["read_shards"]) == (6, 2)
    found = sorted((finding["kind"], finding["layer"], finding["shard"]) for finding in report["findings"])
    assert found == sorted(
        [
            *(("damaged", RED, shard) for shard in shards),
            ("damaged", "samples", shards[5]),
            ("missing", "captions/namer", shards[0]),
        ]
    )


@pytest.mark.slow
def test_processes_find_what_threads_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = small_dataset(tmp_path, sizes=(3,) * 40)
    files = sorted((Path(url) / RED).iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-100])
    first, second = (file.read_bytes() for file in files[2:4])
    files[2].write_bytes(second)
    files[3].write_bytes(first)
    write_tar(tmp_path / "source" / "00007.tar", members_of(7, 4))
    for quick in (True, False):
        reports = [
            validate(url, [str(tmp_path)], quick, count=True, processes=processes).as_json() for processes in (1, 3)
        ]
        assert reports[0] == reports[1]
        assert [finding["kind"] for finding in reports[0]["findings"]] == ["damaged", "misplaced", "misplaced"]
        assert len(reports[0]["changed_sources"]) == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_command_with_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardReader, "__reduce__", lambda self: (os._exit, (9,)))
    message = r"^{}.*: its process ended with exit status 9, 3 times. It probably lacks memory. Use .*: --workers 1\.$"
    with pytest.raises(UserError, match=message.format(next(iter(Store(str(made)).shards("samples"))))):
        validate(str(made), processes=2)


texts = st.lists(st.text(max_size=20) | st.sampled_from(["x" * 255, "x" * 256, "x" * 257]), max_size=8)
few = settings(max_examples=40)


@few
@given(texts)
def test_keys_have_equal_hashes_exactly_if_they_are_equal(keys: list[str]) -> None:
    every = [*keys, *(f"{key}\0" for key in keys), *keys[::-1]]
    hashes = hash_keys(pa.array(every, pa.string())).tolist()
    assert len({*hashes}) == len({*every})
    assert dict(zip(every, hashes, strict=True)) == {
        key: hash_keys(pa.array([key], pa.string())).tolist()[0] for key in every
    }


@few
@given(texts, texts, st.integers(0, 5))
def test_hashes_and_digests_are_of_the_keys_and_not_of_how_arrow_holds_them(
    first: list[str], second: list[str], start: int
) -> None:
    whole = pa.array(["before", *first], pa.string())[1:]
    parts = pa.chunked_array([whole[:start], whole[start:]])
    assert hash_keys(parts).tolist() == hash_keys(pa.array(first, pa.string())).tolist()
    digests = [digest_keys(pa.array(keys, pa.string())) for keys in (first, second, [*first, None], [*first, ""])]
    assert digest_keys(parts) == digests[0]
    assert (digests[0] == digests[1]) == (first == second)
    assert len({digests[0], *digests[2:]}) == 3
