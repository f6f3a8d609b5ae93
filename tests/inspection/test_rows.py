"""What is known of rows, compared with the samples themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reinforce
from reinforce.dataset.augment.records import OPS
from reinforce.inspection.gallery import choose, synthetic_gap
from reinforce.inspection.rows import Rows, read_rows
from reinforce.inspection.selection import select
from tests.helpers.reinforced import small_dataset


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rows(url: str) -> Rows:
    data = reinforce.open(url)
    return read_rows(data, select(data, 1000, 0))


def test_rows_have_the_similarities_and_crops_of_their_samples(url: str, rows: Rows) -> None:
    samples = list(reinforce.open(url))
    assert rows.keys == [sample.key for sample in samples]
    areas, bits = np.concatenate(rows.areas), np.concatenate(rows.operations)
    for number, sample in enumerate(samples):
        true = sample.texts["red"]["caption"][0]
        expected = [true @ image / np.linalg.norm(true) / np.linalg.norm(image) for image in sample.images["red"]]
        np.testing.assert_allclose(rows.similarities("red", "caption")[number], expected, atol=1e-5)
        synthetic = sample.texts["red"]["namer"] @ sample.images["red"].T
        np.testing.assert_allclose(rows.similarities("red", "namer")[number], synthetic.mean(1), atol=2e-3)
        for k, augmentation in enumerate(sample.augmentations):
            crop = augmentation.crop
            assert areas[number, k] == pytest.approx(crop.width * crop.height / sample.width / sample.height)
            assert {OPS[n] for n in range(len(OPS)) if bits[number, k] >> n & 1} == {
                op.name for op in augmentation.ops or ()
            }


def test_views_are_ordered_by_what_they_show_of_a_selection_that_is_seeded(
    url: str, rows: Rows, tmp_path: Path
) -> None:
    views = choose(rows, 0, set())
    gap = synthetic_gap(rows)
    assert [*gap[views["synthetic"]]] == sorted(gap[gap > 0], reverse=True)[:24]
    assert [*gap[views["true"]]] == sorted(gap[gap < 0])[:24]
    assert sorted(views["random"]) == [*range(44)]
    assert views["key"] == sorted(range(44), key=lambda row: (rows.places[row][0].shard, rows.keys[row]))
    data = reinforce.open(url)
    chosen = [select(data, 20, seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [selection.rows for selection in chosen] == [20, 20, 20]
    assert len(chosen[0].by_shard()) > 1
    assert (chosen[0].samples, chosen[0].exact) == (44, True)
    # Without an index, their number is estimated.
    url = small_dataset(tmp_path, (6,) * 5)
    (tmp_path / "out/index/samples.parquet").unlink()
    found = select(reinforce.open(url), 2, 0)
    assert (found.samples, found.exact, found.rows) == (30, False, 2)
