"""The nearest images of a report, compared with the stored vectors of all samples."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import reinforce
from reinforce.dataset.vectors import normalized
from reinforce.inspection import gallery
from reinforce.inspection.contents import find_neighbours, similarity_charts
from reinforce.inspection.report import inspect
from reinforce.inspection.rows import Rows, read_rows
from reinforce.inspection.selection import select
from tests.helpers.models import ImageOnly
from tests.helpers.reinforced import small_dataset

ALONE = {"captions": "none"}
TEACHERS = {"eye.1": {"class": "tests.helpers.models:ImageOnly"}, "half": {"class": f"{__name__}:Half"}}


class Half(ImageOnly):
    """An image encoder that gives no finite vector of an image that is dark in the mean."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        vectors = super().encode_images(pixels)
        vectors[pixels.mean(dim=(1, 2, 3)) < -0.5] = torch.nan
        return vectors


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_dataset(tmp_path_factory.mktemp("alone"), (21, 9), teachers=TEACHERS, captioners={}, input=ALONE)


def rows_of(url: str) -> Rows:
    data = reinforce.open(url)
    return read_rows(data, select(data, 1000, 0))


def test_the_nearest_images_are_those_of_the_mean_vectors_and_rows_without_a_vector_have_none(url: str) -> None:
    rows, samples = rows_of(url), list(reinforce.open(url))
    assert rows.image_teachers == {"eye.1": 2, "half": 2}
    found = dict(find_neighbours(rows, range(len(rows))))
    assert len(found) == 24
    means = normalized(np.stack([normalized(sample.images["eye.1"]).mean(axis=0) for sample in samples]))
    null = [row for row, sample in enumerate(samples) if np.isnan(sample.images["half"]).any()]
    assert 0 < len(null) < len(rows)
    for row, nearest in found.items():
        cosines = means @ means[row]
        cosines[row] = -2
        best = np.sort(cosines)[::-1][:6]
        np.testing.assert_allclose([cosine for _, cosine in nearest["eye.1"]], best, atol=2e-3)
        np.testing.assert_allclose([cosines[other] for other, _ in nearest["eye.1"]], best, atol=2e-3)
        assert not {other for other, _ in nearest["half"]} & {row, *null}
        assert (nearest["half"] == []) == (row in null)


def test_charts_compare_crops_of_one_image_with_two_images(url: str) -> None:
    rows = rows_of(url)
    charts = list(similarity_charts(rows, 0))
    assert [chart.title for chart in charts] == ["eye.1", "half"]
    table = {line[0]: line for line in charts[0].table}
    vectors = [normalized(sample.images["eye.1"]) for sample in reinforce.open(url)]
    own = np.mean([one @ two for one, two in vectors])
    assert float(table["two crops of one image"][2]) == pytest.approx(own, abs=2e-3)
    assert table["two images"][1] == str(len(rows) - 1)


def test_neighbours_outside_the_gallery_have_pictures_and_a_page_without_captions_says_none(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "_RANDOM", 2)
    inspect(url, str(tmp_path / "report"))
    page = (tmp_path / "report" / "neighbours.html").read_text()
    assert page.count("<h3>eye.1</h3>") == page.count("<h3>half</h3>") == 2
    pictures = set(re.findall(r'src="(images/[^"]+)"', page))
    assert any("other-" in picture for picture in pictures)
    assert all((tmp_path / "report" / picture).is_file() for picture in pictures)
    for name in ("gallery", "plots", "neighbours"):
        text = re.sub(r"<[^>]+>", "", (tmp_path / "report" / f"{name}.html").read_text())
        assert not re.search("captions?\\b", text, re.IGNORECASE), name


@pytest.mark.parametrize("size", [1, 2])
def test_one_image_has_no_neighbour_and_a_teacher_of_texts_as_well_has_no_page(tmp_path: Path, size: int) -> None:
    eye = {"eye": TEACHERS["eye.1"]}
    alone = small_dataset(tmp_path / "alone", (size,), teachers=eye, captioners={}, input=ALONE)
    inspect(alone, str(tmp_path / "report"))
    page = (tmp_path / "report" / "neighbours.html").read_text().partition("<main")[2]
    assert page.count("<li>") == size * size, "each image and its neighbours"
    both = small_dataset(tmp_path / "both", (size,))
    inspect(both, str(tmp_path / "other"))
    assert not (tmp_path / "other" / "neighbours.html").exists()
    assert (tmp_path / "other" / "captions.html").exists()
