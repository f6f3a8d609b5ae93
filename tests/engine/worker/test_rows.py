"""Rows of a shard, from its source and from the samples layer, and images by reference, which may have changed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.index import set_aside
from reinforce.dataset.store import Store
from reinforce.engine.messages import LayerFailure, ShardResult
from reinforce.engine.worker.decode import PixelLayout, runs
from reinforce.engine.worker.shard import GROUP_ROWS, max_group_rows, rows_from_samples
from reinforce.errors import UserError
from reinforce.labels.members import LabelReader
from reinforce.source.formats.base import Shard
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.samples import Refusal
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.stream import DatasetReader
from reinforce.training.order import Order
from schemas import Reason
from teachers.protocols import ImageSpec
from tests.helpers.data import config_of, config_of_tar, members_of, picture, tree, write_tar
from tests.helpers.decoding import RowPixels, copied, lease, read_source
from tests.helpers.reinforced import reinforce_here, shard_process

WHOLE = ImageSpec(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PIXELS, NONE = PixelLayout((2, 24), (WHOLE,)), PixelLayout(None)


def shard_config(folder: Path, members: list[tuple[str, bytes]], **changes: Any) -> dict[str, Any]:
    return config_of_tar(folder, members, **{"captioners": {}, "teachers": {}, **changes})


def from_source(
    config: dict[str, Any], layout: PixelLayout = PIXELS, group_rows: int = GROUP_ROWS
) -> list[RowPixels | Refusal]:
    return read_source(parse_config(config), config["source"], layout, group_rows)


def from_samples(config: dict[str, Any], layout: PixelLayout = PIXELS) -> list[RowPixels]:
    parsed, store = parse_config(config), Store(config["output"])
    [shard] = store.shards("samples")
    with lease(parsed, layout) as taken, store.open_layer("samples", shard) as file:
        return rows_of(copied(rows_from_samples(parsed, Shard(config["source"]), file, LabelReader(), taken, 4), taken))


def rows_of(found: Sequence[RowPixels | Refusal]) -> list[RowPixels]:
    return [row for row in found if isinstance(row, RowPixels)]


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_rows_from_samples_equal_those_from_the_source(tmp_path: Path, images: str) -> None:
    config = shard_config(tmp_path, members_of(0, 11), images=images)
    reinforce_here(config, group_rows=4)
    first, later = rows_of(from_source(config, group_rows=4)), from_samples(config)
    assert [(a.row.key, a.row.caption, a.row.group) for a in later] == [
        (a.row.key, a.row.caption, a.row.group) for a in first
    ]
    assert [a.row.group for a in later] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    for a, b in zip(first, later, strict=True):
        assert (a.row.unreadable, b.row.unreadable, b.row.sample) == (None, None, None)
        np.testing.assert_array_equal(a.crops, b.crops)
        np.testing.assert_array_equal(a.whole[WHOLE], b.whole[WHOLE])


def test_a_broken_image_is_refused_even_where_no_layer_needs_pixels(tmp_path: Path) -> None:
    members = members_of(0, 3)
    members[3] = (members[3][0], members[3][1][:200])
    found = from_source(shard_config(tmp_path, members), NONE)
    assert [row.reason.value for row in found if isinstance(row, Refusal)] == ["image_broken"]
    assert [found_row.crops.size for found_row in rows_of(found)] == [0, 0]


def test_a_sample_without_a_caption_records_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (_, image), *_ = members_of(0, 1)
    config = shard_config(tmp_path, [("0.png", image), ("0.caption", b"a cat"), ("1.png", image)])
    first, second = (found.row.decoded for found in rows_of(from_source(config)))
    [refusal] = first.left_out
    detail = "no caption: looked for .txt, json:caption; the sample has .caption, .png"
    assert refusal == Refusal("0", Reason.NO_TEXT, detail)
    assert second.left_out == (), "a set of images alone is not reported sample by sample"
    [found, _] = rows_of(from_source({**config, "input": {"captions": ["caption"]}}))
    assert found.row.caption == "a cat"
    [unwanted, _] = rows_of(from_source({**config, "input": {"captions": []}}))
    assert unwanted.row.decoded.left_out == ()


def test_a_referenced_image_without_digest_that_is_broken_is_unreadable_and_black(tmp_path: Path) -> None:
    members = members_of(0, 3)
    config = shard_config(tmp_path, members, images="reference")
    reinforce_here(config)
    [path] = (tmp_path / "out" / "samples").iterdir()
    table = pq.read_table(path)
    place = table.schema.get_field_index("image_digest")
    pq.write_table(table.set_column(place, "image_digest", pa.nulls(table.num_rows, pa.uint64())), path)
    members[3] = (members[3][0], bytes(len(members[3][1])))
    write_tar(tmp_path / "source" / "0.tar", members)
    rows = from_samples(config)
    assert [found.row.unreadable is not None for found in rows] == [False, True, False]
    assert rows[1].crops.shape == (2, 24, 24, 3)
    assert not rows[1].crops[:, :8, :8].any()
    assert not rows[1].whole[WHOLE].any()


def test_row_groups_shrink_with_the_number_of_augmentations_and_of_true_captions(tmp_path: Path) -> None:
    assert max_group_rows(1) == 1024
    assert max_group_rows(30) == 364
    assert max_group_rows(10**6) == 1
    assert max_group_rows(1, group_rows=8) == 8
    members = [(f"{i:03d}.{end}", data) for i in range(172) for end, data in (("png", picture(1, 8, 8)), ("txt", b"t"))]
    path = write_tar(tmp_path / "0.tar", members)
    config = parse_config(config_of(str(path), tmp_path / "out", input={"captions_per_sample": 64}))
    assert [found.row.group for found in rows_of(read_source(config, str(path), NONE))] == [0] * 170 + [1] * 2


def test_only_the_shard_itself_is_read_by_reference_and_not_where_no_layer_needs_its_images(tmp_path: Path) -> None:
    config = shard_config(tmp_path, members_of(0, 3), images="reference")
    reinforce_here(config)
    path = next((tmp_path / "out" / "samples").iterdir())
    table = pq.read_table(path)
    forged = [{**reference, "url": "/etc/hostname"} for reference in table["image_ref"].to_pylist()]
    index, field = table.column_names.index("image_ref"), table.schema.field("image_ref")
    pq.write_table(table.set_column(index, field, pa.array(forged, field.type)), path)
    with pytest.raises(UserError, match=r"reference to /etc/hostname, .* add it to `source`"):
        from_samples(config)
    (tmp_path / "source" / "0.tar").unlink()
    rows = [found.row for found in from_samples(config, NONE)]
    assert [row.caption for row in rows] == [f"thing {i} of shard 0" for i in range(3)]
    assert all(row.cell is None and row.unreadable is None for row in rows)


@given(st.lists(st.integers(0, 9), unique=True, min_size=1))
def test_runs_are_the_cells_in_order_without_copies(cells: list[int]) -> None:
    array = np.arange(20, dtype=np.uint8).reshape(10, 2)
    found = runs(array, cells)
    np.testing.assert_array_equal(np.concatenate(found), array[cells])
    assert all(np.shares_memory(part, array) for part in found)
    assert len(found) == 1 + sum(b != a + 1 for a, b in itertools.pairwise(cells))


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


def lease_of(made: Path, folder: Path) -> ShardResult:
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


@pytest.mark.parametrize("read", [lease_of, read_dataset, train])
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
    result = lease_of(made, folder)
    assert result.set_aside == {f"embeddings/red/{what}": "it is of other images" for what in ("images", "caption")}
    reinforce_here(config(made, folder / "out"), group_rows=64)
    fresh = Path(reinforce_here(config(made, folder / "fresh"), group_rows=64))
    assert {k: v for k, v in tree(folder / "out").items() if k != "dataset.json"} == {
        k: v for k, v in tree(fresh).items() if k != "dataset.json"
    }
    read_dataset(made, folder)


@pytest.mark.parametrize("read", [read_dataset, train])
def test_a_file_of_references_without_digests_is_refused(made: Path, folder: Path, read: Any) -> None:
    path = samples_file(folder)
    table = pq.read_table(path).drop_columns("image_digest")
    metadata = {key: value for key, value in pq.read_metadata(path).metadata.items() if key != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises((RefusedFile, UserError), match="it has no column image_digest"):
        read(made, folder)
    assert "embeddings/blue/images" in lease_of(made, folder).layers, "a run computes such a file again"


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
    with pytest.raises(UserError, match=r"1 of 6 images that were read are not those that were in .*0\.tar when"):
        list(reinforce.open(str(tmp_path / "out"), images_from=str(tmp_path)))


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
