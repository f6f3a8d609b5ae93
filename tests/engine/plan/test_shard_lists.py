"""Tables that are divided into shards: Parquet at its row groups, jsonl and csv at lines."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.errors import UserError
from reinforce.source import urls
from reinforce.source.formats import jsonl as lines
from reinforce.source.formats.base import read_samples
from reinforce.source.samples import RawSample
from tests.helpers.data import picture
from tests.helpers.reinforced import reinforce_here

Writer = Callable[[Path, int], str]


def write_parquet(folder: Path, rows: int) -> str:
    """Row groups of 3 rows; rows that are added do not change those before."""
    columns = {"image": [picture(n, 9, 9) for n in range(rows)], "text": [f"row {n}" for n in range(rows)]}
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=3, use_dictionary=False)
    return "rows.parquet"


def jsonl(rows: int) -> bytes:
    images = [base64.b64encode(picture(n, 9, 9)).decode() for n in range(rows)]
    return b"".join(
        json.dumps({"image": image, "text": f"row {n}"}).encode() + b"\n\n" for n, image in enumerate(images)
    )


def write_jsonl(folder: Path, rows: int) -> str:
    (folder / "rows.jsonl").write_bytes(jsonl(rows))
    return "rows.jsonl"


def write_gzip(folder: Path, rows: int) -> str:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(rows), mtime=0))
    return "rows.jsonl.gz"


def write_csv(folder: Path, rows: int) -> str:
    """Texts with line ends and commas in them."""
    for number in range(rows):
        (folder / f"{number}.png").write_bytes(picture(number, 9, 9))
    body = "".join(f'{n}.png,"row {n}"\n' if n % 2 else f'{n}.png,"row\n{n}"\n' for n in range(rows))
    (folder / "rows.csv").write_bytes(b"\xef\xbb\xbf" + f"file_name,text\n{body}".encode())
    return "rows.csv"


WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl, "gzip": write_gzip, "csv": write_csv}


def config(folder: Path, name: str, rows: int | None = 4, **changes: Any) -> dict[str, Any]:
    augmentations = {"count": 1, "size": 8}
    spec = {} if rows is None else {"rows_per_shard": rows}
    return {
        "source": f"{folder}/{name}",
        "output": f"{folder}/out",
        "input": spec,
        "augmentations": augmentations,
        **changes,
    }


def captions(url: str) -> dict[str, list[str]]:
    """The captions of each shard by the end of its name."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(url, "samples").iterdir()):
        table = pq.read_table(path)
        assert all(key.startswith(f"{path.stem}-") for key in table["key"].to_pylist())
        found[path.stem[:-11]] = [text.replace("\n", " ") for text in table["caption"].to_pylist()]
    return found


def rows(first: int, last: int) -> list[str]:
    return [f"row {number}" for number in range(first, last)]


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_that_are_added_form_new_shards_and_finished_ones_keep_theirs(tmp_path: Path, kind: str) -> None:
    write = WRITERS[kind]
    name = write(tmp_path, 10)
    url = reinforce_here(config(tmp_path, name))
    size = 6 if kind == "parquet" else 4
    expected = {f"rows-{number:06d}": rows(n, min(10, n + size)) for number, n in enumerate(range(0, 10, size))}
    assert captions(url) == expected
    before = {path: path.read_bytes() for path in Path(url, "samples").iterdir()}
    assert make_plan(parse_config(config(tmp_path, name))).pending == []

    if kind == "parquet":  # a file with the same row groups, and more
        table = pq.read_table(tmp_path / name)
        with pq.ParquetWriter(tmp_path / name, table.schema) as writer:
            for first in (0, 3, 6, 9):
                writer.write_table(table.slice(first, 3))
            writer.write_table(table.slice(0, 2).set_column(1, "text", pa.array(rows(10, 12))))
    else:
        write(tmp_path, 12)
    assert captions(reinforce_here(config(tmp_path, name))) == {**expected, f"rows-{len(expected):06d}": rows(10, 12)}
    assert before == {path: path.read_bytes() for path in before}
    assert validate(url).findings == []


def test_a_part_is_read_without_the_rest_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 1000)
    last = make_plan(parse_config(config(tmp_path, write_jsonl(tmp_path, 40)))).pending[-1]
    data = bytearray((tmp_path / "rows.jsonl").read_bytes())
    data[: last.part.start - 3000] = bytes(last.part.start - 3000)  # type: ignore[union-attr]
    (tmp_path / "rows.jsonl").write_bytes(data)
    plan = parse_config(config(tmp_path, "rows.jsonl"))
    assert [type(item) for item in read_samples(last.source, plan.input)] == [RawSample] * 4
    groups = make_plan(parse_config(config(tmp_path, write_parquet(tmp_path, 12), 3))).pending
    place = pq.read_metadata(tmp_path / "rows.parquet").row_group(3).column(0).data_page_offset
    data = bytearray((tmp_path / "rows.parquet").read_bytes())
    data[4:place] = bytes(place - 4)
    (tmp_path / "rows.parquet").write_bytes(data)
    assert [type(item) for item in read_samples(groups[-1].source, plan.input)] == [RawSample] * 3


def test_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path, 10)
    made = config(tmp_path, name)
    pending = make_plan(parse_config(made)).pending
    reinforce_here(made)
    (tmp_path / name).write_bytes(jsonl(5))
    with pytest.raises(UserError, match=r"rows.jsonl has .* bytes, and had .* when its shards were formed"):
        make_plan(parse_config(made))
    *_, refusal = read_samples(pending[-1].source, parse_config(made).input)
    assert refusal.detail.startswith("it has less than the")
    (tmp_path / name).write_bytes(b" \n" * len(jsonl(10)))
    [refusal] = read_samples(pending[0].source, parse_config(made).input)
    assert refusal.detail == "0 rows where 4 were when its shards were formed"  # type: ignore[union-attr]
    write_parquet(tmp_path, 10)
    other = config(tmp_path, "rows.parquet", output=f"{tmp_path}/other")
    first = make_plan(parse_config(other)).pending[0]
    reinforce_here(other)
    pq.write_table(pq.read_table(tmp_path / "rows.parquet"), tmp_path / "rows.parquet", row_group_size=2)
    with pytest.raises(UserError, match=r"other row groups than when its shards were formed. Restore it"):
        make_plan(parse_config(other))
    [refusal] = read_samples(first.source, parse_config(other).input)
    assert refusal.reason.value == "shard_unreadable"  # type: ignore[union-attr]


def test_a_dataset_is_not_divided_later(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path, 6)
    reinforce_here(config(tmp_path, name, None))
    with pytest.raises(UserError, match=r"input.rows_per_shard: not set in the dataset, 4 in this config"):
        make_plan(parse_config(config(tmp_path, name, 4)))


def test_a_file_that_cannot_be_read_is_one_shard(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more PAR1")
    write_jsonl(tmp_path, 2)
    plan = make_plan(parse_config(config(tmp_path, "rows.parquet")))
    [refusal] = read_samples(plan.pending[0].source, plan.config.input)
    assert refusal.reason.value == "shard_unreadable"  # type: ignore[union-attr]


def test_rows_of_a_file_that_could_not_be_divided_once_are_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, write_jsonl(tmp_path, 4))
    with monkeypatch.context() as patch:
        patch.setattr("reinforce.engine.plan.source_shards.filesystem", Mock(side_effect=TimeoutError))
        reinforce_here(made)
    assert captions(reinforce_here(made)) == {"rows-000000": rows(0, 4)}
    (tmp_path / "rows.jsonl").unlink()
    assert make_plan(parse_config(made)).pending == []


def test_a_large_table_that_is_one_shard_is_noted(tmp_path: Path) -> None:
    write_csv(tmp_path, 2)
    with (tmp_path / "rows.csv").open("ab") as file:
        file.truncate(2**24 + 1)
    plan = make_plan(parse_config(config(tmp_path, "rows.csv", None)))
    assert any(
        "is one shard, which one worker reads; set input.rows_per_shard" in note for note in check_source(plan)[1]
    )


@pytest.mark.parametrize("fewer", [5, 11])
@pytest.mark.parametrize("kind", WRITERS)
def test_after_samples_are_dropped_a_changed_table_is_divided_as_by_a_first_run(
    tmp_path: Path, kind: str, fewer: int
) -> None:
    """The table was written again meanwhile, with other rows, and shards have another number of rows."""
    name = WRITERS[kind](tmp_path, 9)
    reinforce_here(config(tmp_path, name))
    WRITERS[kind](tmp_path, 10)
    reinforce_here(config(tmp_path, name))
    store = Store(f"{tmp_path}/out")
    plan = plan_drop(store, ["*"])
    assert len(plan.lists) == 2
    assert any(line.startswith("lists, which name the files or rows of each shard: 2 files (") for line in plan.lines())
    drop(store, plan)
    assert not (tmp_path / "out" / "lists").exists()
    WRITERS[kind](tmp_path, fewer)
    again = reinforce_here(config(tmp_path, name, 6))
    assert [text for texts in captions(again).values() for text in texts] == rows(0, fewer)
    first = reinforce_here(config(tmp_path, name, 6, output=f"{tmp_path}/first"))
    assert captions(again) == captions(first)
    assert validate(again).valid


def test_after_samples_are_dropped_a_folder_is_divided_anew(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    values = config(tmp_path, "photos", None)
    for first in (3, 6):  # each time, the new files form a shard
        for number in range(first - 3, first):
            (photos / f"{number}.png").write_bytes(picture(number, 9, 9))
        reinforce_here(values)
    store = Store(f"{tmp_path}/out")
    drop(store, plan_drop(store, ["*"]))
    (photos / "1.png").unlink()
    assert len(make_plan(parse_config(values)).pending) == 1
    reinforce_here(values)
    assert [sample.key for sample in reinforce.open(f"{tmp_path}/out")] == ["0", "2", "3", "4", "5"]
    assert not store.shards("quarantine/samples")
