"""What `reinforce validate` reads, and what it finds in views: damaged files, other rows, inputs that have changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pyarrow as pa
import pytest

import reinforce
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.shard_checks import ShardReader
from reinforce.dataset.store import Listing, Store
from reinforce.dataset.validate import validate
from reinforce.errors import UserError
from tests.helpers.commands import printed_by
from tests.helpers.data import members_of, write_tar
from tests.helpers.reinforced import flip, rewrite, small_dataset
from tests.helpers.views import make_view

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


@pytest.fixture
def viewed(dataset: Path) -> Path:
    """A copy of a dataset with a view."""
    make_view(dataset, "captions.namer[1] IS NOT NULL AND key LIKE '%1'", name="best")
    return dataset


def rows_file(url: Path) -> Path:
    return sorted(url.glob("views/best/rows-*/*"))[0]


def one_more(table: pa.Table) -> pa.Table:
    """The rows with another one left out or kept."""
    left_out = table["left_out"].to_pylist()
    changed = [None if left_out[0] else "1 where", *left_out[1:]]
    return table.set_column(1, table.schema.field(1), pa.array(changed, pa.string()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda url: rows_file(url).unlink(), "view best has no rows of "),
        (lambda url: rewrite(rows_file(url), one_more), "does not have the digest that the view states"),
        (lambda url: flip(rows_file(url), "left_out"), "cannot be read"),
        (lambda url: next(url.glob("views/best/shards-*")).write_bytes(b"PAR1"), "does not have the digest that view"),
        (
            lambda url: (url / "views/best/view.json").write_text(
                (url / "views/best/view.json").read_text().replace("%1", "%2")
            ),
            "does not have its fingerprint: it was changed",
        ),
    ],
)
def test_a_damaged_view_is_one_finding_and_is_not_read(
    viewed: Path, damage: Callable[[Path], object], message: str
) -> None:
    assert validate(str(viewed)).valid
    damage(viewed)
    found = validate(str(viewed))
    [finding] = found.findings
    assert message in finding.message
    assert (finding.kind, finding.layer, finding.at_fault) == ("view", "views/best", False)
    with pytest.raises(UserError, match=r"[Mm]ake (it|the view) again"):
        list(reinforce.open(str(viewed), view="best"))


def test_a_view_of_a_dropped_layer_is_a_note(viewed: Path) -> None:
    store = Store(str(viewed))
    drop(store, plan_drop(store, ["captions/*", "embeddings/*/namer"]))
    found = validate(str(viewed))
    assert found.valid
    assert "view best is refused: captions/namer was dropped since view best was made. Make it again" in found.code[-1]
