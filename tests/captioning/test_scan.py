from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow.compute as pc
import pytest

from reinforce.captioning.config import Data
from reinforce.captioning.scan import SCAN_SCHEMA, list_files, scan
from reinforce.errors import UserError
from tests.helpers.captioning import write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.reinforced import reinforce_here


def test_captions_are_read_from_lines_lists_or_one_text(tmp_path: Path) -> None:
    document = json.dumps({"many": [" two ", "", "one", "two"], "single": "s"}).encode()
    members = [("a.png", picture(0)), ("a.json", document), ("a.txt", b"first\n\n  second\nfirst\n")]
    path = write_tar(tmp_path / "0.tar", [*members, ("b.png", picture(1)), ("b.txt", b"of b")])

    def captions_by(*fields: str) -> list[str]:
        data = Data(source=str(path), captions=list(fields))
        captions: list[str] = scan(data.source, data, "data")["captions"][0].as_py()
        return captions

    assert captions_by("json:many", "txt") == ["two", "one"]
    assert captions_by("json:single", "txt") == ["s"]
    assert captions_by("json:none", "lines:txt") == ["first", "second"]
    assert captions_by("txt") == ["first    second first"]


def test_offsets_locate_the_images_in_their_tars(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 2)
    data = Data(source=f"{tmp_path}/shards/*.tar")
    table = scan(data.source, data, "data")
    assert table.schema == SCAN_SCHEMA
    for row, seed in zip(table.to_pylist(), [0, 1, 2, 1000, 1001], strict=True):
        tar = Path(row["url"]).read_bytes()
        assert tar[row["offset"] : row["offset"] + row["length"]] == picture(seed)


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_dataset_gives_the_captions_of_its_shards(tmp_path: Path, images: str) -> None:
    write_shards(tmp_path, 4, 3, captions=2)
    data = Data(source=f"{tmp_path}/shards/*.tar", images_from=[f"{tmp_path}/shards"])
    config = {"source": data.source, "output": f"{tmp_path}/dataset", "images": images, "augmentations": {"size": 8}}
    dataset = reinforce_here(config)
    of_shards, of_dataset = (scan(source, data, "data") for source in (data.source, dataset))
    for column in ("key", "length", "captions"):
        assert of_dataset[column].to_pylist() == of_shards[column].to_pylist()
    if images == "reference":
        assert of_dataset["offset"].to_pylist() == of_shards["offset"].to_pylist()
    else:
        files = list_files(dataset, data, "data")
        assert of_dataset["url"].unique().to_pylist() == [shard.url for shard in files]
        assert pc.min(of_dataset["offset"]).as_py() == 0


def test_samples_without_captions_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(30)]
    members += [("30.png", picture(30)), ("30.json", b'{"captions": []}'), ("31.txt", b"no image")]
    members += [member for i in range(40, 60) for member in ((f"{i}.png", picture(i)), (f"{i}.txt", b"c"))]
    data = Data(source=str(write_tar(tmp_path / "0.tar", members)))
    with caplog.at_level(logging.WARNING):
        table = scan(data.source, data, "data")
    assert table["key"].to_pylist() == [str(i) for i in range(40, 60)]
    assert "32 samples refused (31 no_text, 1 no_image), 20 images with captions kept" in caplog.text
    assert "refused 0: no_text (members other than the image: none)" in caplog.text


def test_a_source_without_captions_is_a_user_error(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    data = Data(source=f"{tmp_path}/shards/*.tar", captions=["json:text"])
    with pytest.raises(UserError, match="data: none of 2 samples has an image and a caption at json:text"):
        scan(data.source, data, "data")
