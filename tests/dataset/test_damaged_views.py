"""Views whose files have right digests and do not fit the dataset: each reader names the file and the fix."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import reinforce
from reinforce.dataset import view as views
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.dataset.view import read_view, rows_path, shard_rows, shards_path, write_view
from reinforce.errors import UserError
from reinforce.source.urls import digest_of
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from tests.helpers.in_loaders import letters
from tests.helpers.views import keys_of, make_view

AGAIN = "Make it again."


@pytest.fixture
def url(copy: Path) -> str:
    make_view(copy, "width > 0")
    return str(copy)


def forget() -> None:
    """Let readers of this process read the files again, as a new process would."""
    shard_rows.cache_clear()
    views._row_digests.cache_clear()


def first_shard(url: str) -> str:
    return min(read_view(Store(url), "some").counts)


def rewrite_rows(url: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change each row group of the first shard's rows, and state the digest of the new file."""
    store, shard = Store(url), first_shard(url)
    view = read_view(store, "some")
    groups = [change(table) for table in view.rows.read(store, shard, values=True)]
    columns = [tuple(column.combine_chunks() for column in table.columns) for table in groups]
    state_digest(url, view.rows.write(store, shard, columns))  # type: ignore[arg-type]


def state_digest(url: str, digest: int) -> None:
    """State another digest of the first shard's rows, in a file that view.json states the digest of."""
    store = Store(url)
    view = read_view(store, "some")
    digests = array("Q", [digest, *view.files.digests[1:]])
    write_view(store, replace(view, files=replace(view.files, digests=digests)))
    forget()


def test_rows_of_other_samples_are_refused_by_readers_named_in_a_report_and_found_by_validate(url: str) -> None:
    """Keys of as many other samples: nothing else differs."""
    rewrite_rows(url, lambda rows: rows.set_column(0, "key", pc.binary_join_element_wise(rows["key"], "x", "")))
    message = f"view some is of other samples of {first_shard(url)}. {AGAIN}"
    assert message in str(error_of(lambda: keys_of(url)))
    assert reinforce.inspect(url, f"{url}-report", view="some").problems == 1
    assert any(message in page.read_text() for page in Path(f"{url}-report").glob("*.html"))
    [finding] = [found for found in validate(url).findings if found.kind == "view"]
    assert finding.message.endswith(message)
    assert (finding.layer, finding.shard) == ("views/some", first_shard(url))


def test_rows_of_fewer_row_groups_than_the_samples_have_are_refused(url: str) -> None:
    store, shard = Store(url), first_shard(url)
    view = read_view(store, "some")
    groups = view.rows.read(store, shard, values=True)
    assert len(groups) > 1
    columns = [tuple(column.combine_chunks() for column in table.columns) for table in groups[:-1]]
    state_digest(url, view.rows.write(store, shard, columns))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"view some is of other samples of {shard}\. {AGAIN}"):
        keys_of(url)


def test_a_training_refuses_a_view_that_counts_other_row_groups_than_the_dataset_has(url: str) -> None:
    store, shard = Store(url), first_shard(url)
    view = read_view(store, "some")
    write_view(store, replace(view, kept={**view.kept, shard: [*view.kept[shard], 0]}))
    forget()
    with pytest.raises(UserError, match=r"view some is of other samples\. Make it again with reinforce select\."):
        StudentFeed(Data.model_validate({"datasets": [{"url": url, "view": "some"}]}), 0, 16, letters)


def test_validate_finds_rows_that_keep_others_than_the_view_counts(url: str) -> None:
    def leave_out_the_first(rows: pa.Table) -> pa.Table:
        reasons = ["1 changed", *rows["left_out"].to_pylist()[1:]]
        return rows.set_column(1, "left_out", pa.array(reasons, rows.schema.field("left_out").type))

    assert [found for found in validate(url).findings if found.kind == "view"] == []
    rewrite_rows(url, leave_out_the_first)
    shard = first_shard(url)
    [finding] = [found for found in validate(url).findings if found.kind == "view"]
    assert finding.message.endswith(f"view some keeps other rows of {shard} than it states. {AGAIN}")
    assert (finding.layer, finding.shard) == ("views/some", shard)


def test_rows_that_are_no_parquet_file_cannot_be_read_though_their_digest_is_right(url: str) -> None:
    store = Store(url)
    path = rows_path("some", read_view(store, "some").fingerprint, first_shard(url))
    store.write_bytes(b"PAR1 and nothing else", *path)
    state_digest(url, digest_of(b"PAR1 and nothing else"))
    with pytest.raises(UserError) as raised:
        keys_of(url)
    assert str(raised.value).startswith(f"{store.path(*path)} cannot be read (")
    assert str(raised.value).endswith("). Make the view again.")
    assert "\n" not in str(raised.value)


def test_digests_that_are_damaged_after_a_view_was_opened_cannot_be_read(url: str) -> None:
    store = Store(url)
    view = read_view(store, "some")
    path = shards_path("some", view.fingerprint)
    whole = store.read_bytes(*path, limit=2**20)
    store.write_bytes(whole[:-9], *path)
    forget()
    with pytest.raises(UserError) as raised:
        view.rows.read(store, min(view.counts))
    assert str(raised.value).startswith(f"{store.path(*path)} cannot be read (")
    assert "does not have the digest that view.json states" in str(error_of(lambda: read_view(store, "some")))
    Path(store.path(*path)).unlink()
    forget()
    assert f"{store.path(*path)} does not exist" in str(error_of(lambda: view.rows.read(store, min(view.counts))))


def error_of(call: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as raised:
        call()
    return raised.value
