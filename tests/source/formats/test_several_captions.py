"""Several true captions of a sample, as sources of every format give them, with and without ``captions_per_sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reinforce.config import Input, parse_config
from reinforce.engine.plan.source_shards import source_shards
from reinforce.source.formats.base import Shard
from reinforce.source.formats.recognise import find_format
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample
from tests.helpers.data import picture, write_tar
from tests.helpers.tables import write_columns, write_huggingface

FIVE = ["a cat", "a cat on a mat", "one cat", "cat", "the cat"]
PNG = picture(1)
FLICKR = "image,caption\n" + "".join(f'{name}.png,"{text}, {name}"\n' for name in "ab" for text in FIVE)
FIVE_OF = {name: [f"{text}, {name}" for text in FIVE] for name in "ab"}


def captions(path: Path, format_: str, **spec: Any) -> dict[str, list[str]]:
    """The captions of each sample of a file by key."""
    read = Input(format=format_, **spec)
    items = [*read_samples(Shard(str(path), "s", format_), read)]
    assert all(isinstance(item, RawSample) for item in items), items
    return {item.key: item.captions(read) for item in items if isinstance(item, RawSample)}


def pictures(folder: Path) -> Path:
    for name in "ab":
        (folder / f"{name}.png").write_bytes(picture(ord(name)))
    return folder


def test_members_of_a_tar_have_lists_lines_and_texts(tmp_path: Path) -> None:
    members = [
        ("lines.png", PNG), ("lines.txt", "\n".join(["", *FIVE, FIVE[0], " "]).encode()),
        ("list.png", PNG), ("list.txt", json.dumps(FIVE).encode()),
        ("json.png", PNG), ("json.json", json.dumps({"caption": [*FIVE, None, "  "]}).encode()),
        ("both.png", PNG), ("both.txt", b"a cat"), ("both.json", b'{"caption": "a cat on a mat"}'),
        ("odd.png", PNG), ("odd.txt", b"[a cat], seen from above"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert captions(path, "tar", captions_per_sample=5) == {
        **dict.fromkeys(("lines", "list", "json"), FIVE),
        "both": FIVE[:2],
        "odd": ["[a cat], seen from above"],
    }
    assert captions(path, "tar", captions_per_sample=2)["lines"] == FIVE[:2]
    one = captions(path, "tar")
    assert one["both"] == ["a cat"]
    assert one["json"] == [], "as before, a list in JSON is no text"


def test_columns_of_tables_have_lists_and_several_columns_are_read_together(tmp_path: Path) -> None:
    table = write_huggingface(
        tmp_path / "a.parquet", [PNG, picture(2)], {"caption": [FIVE, ["x\ny"]], "alt": ["A", "B"]}
    )
    both = {"captions": ["caption", "alt"]}
    assert [*captions(Path(table), "parquet", **both, captions_per_sample=9).values()] == [[*FIVE, "A"], ["x y", "B"]]
    assert [*captions(Path(table), "parquet", **both).values()] == [["a cat"], ["x y"]]
    assert [*captions(Path(table), "parquet", captions_per_sample=5).values()] == [FIVE, ["x y"]]


def test_rows_with_one_image_are_one_sample_and_a_part_of_a_table_counts_its_rows(tmp_path: Path) -> None:
    (pictures(tmp_path) / "captions.txt").write_text(FLICKR)
    assert captions(tmp_path / "captions.txt", "csv", captions_per_sample=5) == {
        "s-00000000": FIVE_OF["a"],
        "s-00000005": FIVE_OF["b"],
    }
    assert len(captions(tmp_path / "captions.txt", "csv")) == 10, "without it, each row is a sample"
    columns = {"image": [PNG, PNG, picture(2)], "text": ["a", "b", "c"], "key": ["1", "2", "3"]}
    table = write_columns(tmp_path / "a.parquet", columns)
    assert captions(table, "parquet", captions_per_sample=5) == {"1": ["a", "b"], "3": ["c"]}
    lines = [
        {"file_name": name, "text": text} for name, text in (("a.png", "a"), ("a.png", ["b", "a"]), ("b.png", "c"))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    items = [*read_samples(Shard(f"{tmp_path}/a.jsonl", "s", "jsonl"), spec := Input(captions_per_sample=5))]
    assert [item.captions(spec) for item in items if isinstance(item, RawSample)] == [["a", "b"], ["c"]]
    assert items[-1].key == "s-00000003", "rows keep their numbers"
    (tmp_path / "a.csv").write_text(FLICKR)
    parts = [*find_format("csv").parts(f"{tmp_path}/a.csv", 5)]
    read = [[*read_samples(Shard(f"{tmp_path}/a.csv", "s", "csv", part=part), spec)] for part in parts]
    assert [[item.captions(spec) for item in of if isinstance(item, RawSample)] for of in read] == [
        [FIVE_OF["a"]],
        [FIVE_OF["b"]],
    ]


def test_rows_of_metadata_with_one_file_are_one_sample(tmp_path: Path) -> None:
    rows = FLICKR.replace("image,caption", "file_name,text")
    (pictures(tmp_path) / "metadata.csv").write_text(rows)
    for several, found in ((5, [*FIVE_OF.values()]), (None, [of[:1] for of in FIVE_OF.values()])):
        values = {"source": str(tmp_path), "output": "out", "input": {"captions_per_sample": several}}
        config = parse_config(values)
        shards = source_shards(config)
        [(name, listing)] = shards.lists.items()
        items = [*read_samples(Shard(shards.urls[0], name, "folder", listing), config.input)]
        assert [item.captions(config.input) for item in items if isinstance(item, RawSample)] == found


def test_a_number_that_is_none_is_refused() -> None:
    for number in (0, 65, "all"):
        with pytest.raises(ValueError, match="captions_per_sample"):
            Input(captions_per_sample=number)  # type: ignore[arg-type]
