"""Rows of a shard, from the source and from the samples layer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce.config import parse_config
from reinforce.dataset.augment import replay
from reinforce.dataset.store import Store
from reinforce.engine.rows import GROUP_ROWS, Row, RowSpec, max_group_rows, rows_from_samples, rows_from_source
from reinforce.source.image import decode
from reinforce.source.shards import Refusal
from schemas import Reason
from teachers.pixels import fit
from teachers.protocols import ImageSpec
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import reinforce_here

VIEW = ImageSpec(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SPEC = RowSpec(crops=True, views=(VIEW,))


def shard_config(folder: Path, members: list[tuple[str, bytes]], **changes: Any) -> dict[str, Any]:
    write_tar(folder / "source" / "0.tar", members)
    changes = {"captioners": {}, "teachers": {}, **changes}
    return config_of(f"{folder}/source/0.tar", folder / "out", **changes)


def from_source(config: dict[str, Any], spec: RowSpec = SPEC, group_rows: int = GROUP_ROWS) -> list[Row | Refusal]:
    with ThreadPoolExecutor(2) as pool:
        return list(rows_from_source(parse_config(config), config["source"], spec, pool, 4, group_rows))


def from_samples(config: dict[str, Any], spec: RowSpec = SPEC) -> list[Row]:
    store = Store(config["output"])
    [shard] = store.shards("samples")
    with ThreadPoolExecutor(2) as pool, store.open_layer("samples", shard) as file:
        return list(rows_from_samples(parse_config(config), file, spec, pool, 4))


def rows_of(found: list[Row | Refusal]) -> Iterator[Row]:
    return (row for row in found if isinstance(row, Row))


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_rows_from_samples_equal_those_from_the_source(tmp_path: Path, images: str) -> None:
    config = shard_config(tmp_path, members_of(0, 11), images=images)
    reinforce_here(config, group_rows=4)
    first, later = list(rows_of(from_source(config, group_rows=4))), from_samples(config)
    assert [(row.key, row.caption, row.group) for row in later] == [(row.key, row.caption, row.group) for row in first]
    assert [row.group for row in later] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    for a, b in zip(first, later, strict=True):
        assert (a.unreadable, b.unreadable, b.sample) == (None, None, None)
        np.testing.assert_array_equal(a.pixels.crops, b.pixels.crops)
        np.testing.assert_array_equal(a.pixels.views[VIEW], b.pixels.views[VIEW])


def test_pixels_are_those_of_the_recorded_augmentations_and_of_the_whole_image(tmp_path: Path) -> None:
    config = shard_config(tmp_path, members_of(0, 1))
    [row] = rows_of(from_source(config))
    assert row.sample is not None
    image = decode(row.sample.image, parse_config(config).input.limits)
    assert (row.sample.width, row.sample.height) == image.size
    assert row.pixels.crops is not None
    assert row.pixels.crops.shape == (2, 24, 24, 3)
    for crop, record in zip(row.pixels.crops, row.sample.augmentations, strict=True):
        np.testing.assert_array_equal(crop, np.asarray(replay(image, record)))
    np.testing.assert_array_equal(row.pixels.views[VIEW], fit(image, VIEW))


def test_a_broken_image_is_refused_even_where_no_layer_needs_pixels(tmp_path: Path) -> None:
    members = members_of(0, 3)
    members[3] = (members[3][0], members[3][1][:200])
    found = from_source(shard_config(tmp_path, members), RowSpec(crops=False))
    assert [row.reason.value for row in found if isinstance(row, Refusal)] == ["image_broken"]
    assert [row.pixels.crops for row in rows_of(found)] == [None, None]


def test_an_unusable_sidecar_is_left_out_of_its_sample(tmp_path: Path) -> None:
    members = [(name, b"{" if name.endswith("json") else data) for name, data in members_of(0, 1)]
    [row] = rows_of(from_source(shard_config(tmp_path, members)))
    assert row.sample is not None
    assert [(part.key, part.reason.value) for part in row.sample.left_out] == [(row.key, "sidecar_broken")]


def test_a_caption_is_found_by_the_compound_extension_of_its_image(tmp_path: Path) -> None:
    (_, image), *_ = members_of(0, 1)
    members = [("pic 0.v1.png", image), ("pic 0.v1.txt", b"a cat"), ("pic 0.v1.json", b'{"uid": 1}')]
    [row] = rows_of(from_source(shard_config(tmp_path, members)))
    assert row.sample is not None
    assert (row.key, row.caption, row.sample.metadata) == ("pic 0", "a cat", '{"uid":1}')
    assert row.sample.left_out == ()


def test_a_caption_that_was_read_without_compound_extensions_stays(tmp_path: Path) -> None:
    (_, image), *_ = members_of(0, 1)
    members = [("0.v1.png", image), ("0.v1.txt", b"a cat"), ("0.json", b'{"caption": "a dog"}')]
    [row] = rows_of(from_source(shard_config(tmp_path, members)))
    assert (row.key, row.caption) == ("0", "a dog")


def test_a_sample_without_a_caption_records_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (_, image), *_ = members_of(0, 1)
    config = shard_config(tmp_path, [("0.png", image), ("0.caption", b"a cat"), ("1.png", image)])
    first, second = rows_of(from_source(config))
    assert first.sample is not None
    assert second.sample is not None
    [refusal] = first.sample.left_out
    detail = "no caption: looked for .txt, json:caption; the sample has .caption, .png"
    assert refusal == Refusal("0", Reason.NO_TEXT, detail)
    assert second.sample.left_out == (), "a set of images alone is not reported sample by sample"
    [found, _] = rows_of(from_source({**config, "input": {"captions": ["caption"]}}))
    assert found.caption == "a cat"
    [unwanted, _] = rows_of(from_source({**config, "input": {"captions": []}}))
    assert unwanted.sample is not None
    assert unwanted.sample.left_out == ()


def test_images_are_not_read_back_where_no_layer_needs_them(tmp_path: Path) -> None:
    config = shard_config(tmp_path, members_of(0, 3), images="reference")
    reinforce_here(config)
    (tmp_path / "source" / "0.tar").unlink()
    rows = from_samples(config, RowSpec(crops=False))
    assert [row.caption for row in rows] == [f"thing {i} of shard 0" for i in range(3)]
    assert all(row.pixels.crops is None and row.unreadable is None for row in rows)


def test_a_referenced_image_that_has_changed_is_unreadable_and_black(tmp_path: Path) -> None:
    members = members_of(0, 3)
    config = shard_config(tmp_path, members, images="reference")
    reinforce_here(config)
    members[3] = (members[3][0], bytes(len(members[3][1])))
    write_tar(tmp_path / "source" / "0.tar", members)
    rows = from_samples(config)
    assert [row.unreadable is not None for row in rows] == [False, True, False]
    crops = rows[1].pixels.crops
    assert crops is not None
    assert crops.shape == (2, 24, 24, 3)
    assert not crops[:, :8, :8].any()
    assert not rows[1].pixels.views[VIEW].any()


def test_row_groups_shrink_with_the_number_of_augmentations() -> None:
    assert max_group_rows(1) == 1024
    assert max_group_rows(30) == 364
    assert max_group_rows(10**6) == 1
    assert max_group_rows(1, group_rows=8) == 8
