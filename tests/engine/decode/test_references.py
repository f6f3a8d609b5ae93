"""Images that are stored by reference are refused if they are not those that the samples were made of."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.dataset.files.damage import set_aside
from reinforce.dataset.files.store import Store
from reinforce.engine.messages.results import LayerFailure, ShardResult
from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.reader import DatasetReader
from reinforce.training.order import Order
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here, shard_process

ROWS, SAME = 30, 12  # images: in the shard, and before the first that is replaced


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard whose first 64 KiB are images that stay, and which has one teacher only."""
    folder = tmp_path_factory.mktemp("references")
    write_tar(folder / "source" / "0.tar", members())
    reinforce_here({**config(folder), "teachers": {"red": config(folder)["teachers"]["red"]}}, group_rows=64)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, with the source where it was."""
    shutil.copytree(made / "out", tmp_path / "out")
    yield tmp_path
    write_tar(made / "source" / "0.tar", members())


def members(other: bool = False) -> list[tuple[str, bytes]]:
    """Members of the tar; ``other`` has other images of the same sizes under the last keys."""
    found = members_of(0, ROWS, width=120, height=90, format_="BMP")
    replaced = [picture(900 + i, 120, 90, "BMP") for i in range(ROWS)]
    return [
        (name, replaced[i // 3] if other and name.endswith(".png") and i // 3 >= SAME else data)
        for i, (name, data) in enumerate(found)
    ]


def config(made: Path, output: Path | None = None) -> dict[str, Any]:
    return config_of(f"{made}/source/0.tar", output or made / "out", images="reference", captioners={})


def lease(made: Path, folder: Path) -> ShardResult:
    return shard_process(config(made, folder / "out"), 64).run()


def samples_file(folder: Path) -> Path:
    [path] = (folder / "out" / "samples").iterdir()
    return path


def read_dataset(made: Path, folder: Path) -> None:
    list(reinforce.open(str(folder / "out"), images_from=str(made / "source")))


def train(made: Path, folder: Path) -> None:
    data = {"datasets": [str(folder / "out")], "images_from": [str(made / "source")], "teachers": ["red"]}
    [opened] = open_datasets(Data.model_validate({k: v for k, v in data.items() if k != "teachers"}), 0, None)
    with ThreadPoolExecutor(1) as pool:
        next(iter(DatasetReader(opened, Order(opened.groups[:, 2], 0, "d", 1, ROWS), 0, 0, pool)))


@pytest.mark.parametrize("read", [lease, read_dataset, train])
def test_replaced_images_are_refused_with_their_number(made: Path, folder: Path, read: Any) -> None:
    write_tar(made / "source" / "0.tar", members(other=True))
    with pytest.raises((LayerFailure, UserError)) as caught:
        read(made, folder)
    message = str(caught.value)
    assert f"{ROWS - SAME} of {ROWS} images that were read are not those that were in {made}/source/0.tar" in message
    assert f"or drop the samples by reinforce drop {folder}/out samples --shard " in message
    assert samples_file(folder).stem in message
    assert not (folder / "out" / "embeddings" / "blue").exists()


def test_samples_of_the_new_images_replace_the_other_layers(made: Path, folder: Path) -> None:
    write_tar(made / "source" / "0.tar", members(other=True))
    set_aside(Store(str(folder / "out")), "samples", samples_file(folder).stem)
    result = lease(made, folder)
    assert result.set_aside == {f"embeddings/red/{what}": "it is of other images" for what in ("images", "caption")}
    reinforce_here(config(made, folder / "out"), group_rows=64)
    fresh = Path(reinforce_here(config(made, folder / "fresh"), group_rows=64))
    assert {k: v for k, v in tree(folder / "out").items() if k != "dataset.json"} == {
        k: v for k, v in tree(fresh).items() if k != "dataset.json"
    }
    read_dataset(made, folder)


def test_files_without_digests_are_read_as_before(made: Path, folder: Path) -> None:
    path = samples_file(folder)
    metadata = pq.read_metadata(path).metadata
    metadata.pop(b"ARROW:schema")
    metadata.pop(b"reinforce.images_digest")
    table = pq.read_table(path).drop_columns("image_digest")
    pq.write_table(table.replace_schema_metadata(metadata), path)
    read_dataset(made, folder)
    train(made, folder)
    assert "embeddings/blue/images" in lease(made, folder).layers


def of_pictures(folder: Path, count: int = 8) -> dict[str, Any]:
    """A config over a folder of pictures, by reference, with samples and one teacher computed."""
    (folder / "pictures").mkdir()
    for number in range(count):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(number))
        (folder / "pictures" / f"{number}.txt").write_text(f"thing {number}")
    made = config_of(f"{folder}/pictures", folder / "out", images="reference")
    reinforce_here({**made, "captioners": {}, "teachers": {"red": made["teachers"]["red"]}})
    return made


def layer_of(folder: Path, layer: str) -> list[Any]:
    [path] = (folder / "out" / layer).glob("*.parquet")
    table = pq.read_table(path)
    return table[table.column_names[1]].to_pylist()


def test_a_replaced_picture_costs_its_row_in_a_layer_that_is_added_later(tmp_path: Path) -> None:
    made = of_pictures(tmp_path)
    reinforce_here({**made, "output": f"{tmp_path}/whole/out"})
    (tmp_path / "pictures" / "2.png").write_bytes(picture(99) + picture(98))
    (tmp_path / "pictures" / "3.png").write_bytes(picture(3)[:50])
    (tmp_path / "pictures" / "5.png").unlink()
    reinforce_here(made)
    for layer in ("embeddings/blue/images", "captions/namer"):
        whole, rows = layer_of(tmp_path / "whole", layer), layer_of(tmp_path, layer)
        assert rows == [None if number in (2, 3, 5) else row for number, row in enumerate(whole)]
        [file] = (tmp_path / "out" / "quarantine" / layer).glob("*.parquet")
        refused = {row["key"]: (row["reason"], row["detail"]) for row in pq.read_table(file).to_pylist()}
        assert {key: reason for key, (reason, _) in refused.items()} == {
            "2": "image_broken", "3": "image_missing", "5": "image_missing",
        }  # fmt: skip
        assert "another image than when the samples were written" in refused["2"][1]
    assert all(row is not None for row in layer_of(tmp_path, "embeddings/blue/caption")), "of the true captions"


def test_one_replaced_picture_of_a_tar_costs_its_row_also_at_the_beginning(tmp_path: Path) -> None:
    images = [picture(number, format_="BMP") for number in range(6)]
    write_tar(tmp_path / "0.tar", [(f"{number}.bmp", image) for number, image in enumerate(images)])
    made = config_of(f"{tmp_path}/0.tar", tmp_path / "out", images="reference", captioners={})
    reinforce_here({**made, "teachers": {"red": made["teachers"]["red"]}})
    images[0] = picture(99, format_="BMP")
    write_tar(tmp_path / "0.tar", [(f"{number}.bmp", image) for number, image in enumerate(images)])
    reinforce_here(made)
    assert [row is None for row in layer_of(tmp_path, "embeddings/blue/images")] == [True] + [False] * 5


def test_a_source_that_is_replaced_or_gone_as_a_whole_gives_no_layer_of_nulls(tmp_path: Path) -> None:
    made = of_pictures(tmp_path)
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture(50 + number))
    with pytest.raises(LayerFailure, match=r"5 of 8 images that were read are not those that were in .*0\.png when"):
        reinforce_here(made)
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        reinforce_here(made)
    assert not (tmp_path / "out" / "embeddings" / "blue").exists()
