"""What is known of rows, of their targets and of near images, compared with the samples and with definitions."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reinforce
from reinforce.dataset.vectors import normalized
from reinforce.explore import gallery
from reinforce.explore.gallery import choose, mean_rank, measures, synthetic_gap
from reinforce.explore.plots import (
    count_classes,
    find_clusters,
    find_neighbours,
    find_similar,
    similarity_charts,
)
from reinforce.explore.report import inspect
from reinforce.explore.rows import BATCH, SCALES, SampledRows, Targets, read_rows, select
from reinforce.images.backends import known_operations
from tests.helpers.models import ImageOnly
from tests.helpers.reinforced import small_dataset


@pytest.fixture(scope="module")
def rows(labelled: str) -> SampledRows:
    data = reinforce.open(labelled)
    return read_rows(data, select(data, 1000, 0))


def test_rows_have_the_similarities_and_crops_of_their_samples(labelled: str, rows: SampledRows) -> None:
    samples = list(reinforce.open(labelled))
    assert rows.keys == [sample.key for sample in samples]
    areas, bits = np.concatenate(rows.areas), np.concatenate(rows.operations)
    for number, sample in enumerate(samples):
        true = sample.texts["red"]["caption"][0]
        expected = [true @ image / np.linalg.norm(true) / np.linalg.norm(image) for image in sample.images["red"]]
        np.testing.assert_allclose(rows.crop_similarities("red")[number], expected, atol=1e-5)
        synthetic = sample.texts["red"]["namer"] @ sample.images["red"].T
        np.testing.assert_allclose(rows.similarities("red", "namer")[number], synthetic.mean(1), atol=2e-3)
        for k, augmentation in enumerate(sample.augmentations):
            crop = augmentation.crop
            assert areas[number, k] == pytest.approx(crop.width * crop.height / sample.width / sample.height)
            found = {name for n, name in enumerate(known_operations()) if bits[number, k] >> n & 1}
            assert found == {op.name for op in augmentation.ops or ()}


def test_tabs_are_ordered_by_what_they_show_of_a_seeded_selection(
    labelled: str, rows: SampledRows, tmp_path: Path
) -> None:
    tabs = choose(rows, 0, set())
    gap = synthetic_gap(rows)
    assert [*gap[tabs["synthetic"]]] == sorted(gap[gap > 0], reverse=True)[:24]
    assert [*gap[tabs["true"]]] == sorted(gap[gap < 0])[:24]
    fits = [rows.true_similarity(teacher).tolist() for teacher in ("red", "blue")]
    ranks = [[sorted(of_teacher).index(value) / 43 for value in of_teacher] for of_teacher in fits]
    np.testing.assert_allclose(mean_rank(rows), np.mean(ranks, axis=0))
    assert tabs["worst"] == np.argsort(np.mean(ranks, axis=0), kind="stable")[:24].tolist()
    assert [*measures(rows)] == [
        "agreement of the teachers", *(f"fit of the true caption by {name}" for name in ("red", "blue")),
        "words of the true caption",
    ]  # fmt: skip
    assert {*measures(rows)["words of the true caption"]} == {5.0}
    assert sorted(tabs["random"]) == [*range(44)]
    assert tabs["key"] == sorted(range(44), key=lambda row: (rows.places[row][0].shard, rows.keys[row]))
    data = reinforce.open(labelled)
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


def test_similar_images_are_the_pairs_of_the_definition_and_rows_without_a_vector_have_none(rows: SampledRows) -> None:
    for count in (44, 1100):  # more rows than are compared at once
        made = unit(count, 8, seed=3)
        made[5] = np.nan
        found = find_similar(replace(rows, images={"red": [made]}, compared="red"))
        cosines = made @ made.T
        every = [(cosines[a, b], a, b) for a in range(count) for b in range(a) if 5 not in (a, b)]
        best = sorted(every, reverse=True)[:24]
        assert {frozenset(pair[:2]) for pair in found.pairs} == {frozenset(pair[1:]) for pair in best}
        np.testing.assert_allclose([pair[2] for pair in found.pairs], [pair[0] for pair in best], atol=1e-6)
        np.fill_diagonal(cosines, -1)
        near = np.nanmax(np.delete(np.delete(cosines, 5, 0), 5, 1), axis=1)
        assert [*found.counts] == [(least, int((near >= least).sum())) for least in (0.9, 0.95, 0.98)]
    assert find_similar(replace(rows, images={"red": [np.full((44, 8), np.nan)]}, compared="red")) is None
    assert find_similar(replace(rows, compared=None)) is None


def test_clusters_are_groups_of_images_the_largest_first_with_those_nearest_to_the_middle(rows: SampledRows) -> None:
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(4), [15, 12, 10, 7]))
    made = np.eye(4, 8)[groups] + 0.05 * rng.standard_normal((44, 8))
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    found = find_clusters(replace(rows, images={"red": [made]}, compared="red"), 0)
    assert (found.teacher, found.count, found.smallest) == ("red", 4, 7)
    assert [size for size, _ in found.largest] == [15, 12, 10, 7]
    for group, (_, shown) in enumerate(found.largest):
        own = [rows.places.index(place) for _, place in shown]
        middle = made[groups == group].mean(axis=0)
        assert own == sorted(np.flatnonzero(groups == group), key=lambda row: -made[row] @ middle)[:6]
    made[3:] = np.nan
    assert find_clusters(replace(rows, images={"red": [made]}, compared="red"), 0) is None
    assert find_clusters(replace(rows, compared=None), 0) is None


def test_classes_are_counted_unless_most_samples_have_one_of_their_own(rows: SampledRows) -> None:
    found = count_classes(replace(rows, classes=["b"] * 30 + ["a"] * 10 + [None] * 4))
    assert (found.largest, found.hidden, found.without) == ([("b", 30), ("a", 10)], 0, 4)
    many = count_classes(replace(rows, classes=[f"{n:03d}" for n in range(50) for _ in range(3)]))
    assert (len(many.largest), many.hidden, len(many.smallest), many.count) == (20, 10, 20, 50)
    for none in ([None] * 44, ["a"] * 44, [str(n) for n in range(44)]):
        assert count_classes(replace(rows, classes=none)) is None


def unit(*shape: int, seed: int) -> np.ndarray:
    return normalized(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def definition(images: np.ndarray, texts: np.ndarray, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    logits = scale * torch.from_numpy(images.astype(np.float64) @ texts.astype(np.float64).T)
    return torch.softmax(logits, 1), torch.softmax(logits.T, 1)


def entropy(targets: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(targets).entropy()


def test_entropy_and_agreement_are_those_of_the_definition() -> None:
    rows = {"a": (unit(40, 8, seed=0), unit(40, 8, seed=1)), "b": (unit(40, 6, seed=2), unit(40, 6, seed=3))}
    scales = {"a": 10.0, "b": 30.0}
    targets = Targets(scales)
    for part in (slice(0, 25), slice(25, 40)):
        targets.add({name: (images[part], texts[part]) for name, (images, texts) in rows.items()})
    targets.finish()
    place = SCALES.index(10)
    expected = torch.stack([entropy(p).mean() for p in definition(*rows["a"], 10)]).mean() / np.log(40)
    assert targets.entropy("a")[place] == pytest.approx(float(expected), abs=1e-4)
    both = [definition(*rows[name], scale) for name, scale in scales.items()]
    divergences = [entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2 for p, q in zip(both[0], both[1], strict=True)]
    agreement = 1 - torch.stack(divergences).mean(0) / np.log(2)
    np.testing.assert_allclose(targets.agreements(), agreement.numpy(), atol=1e-4)


def test_equal_teachers_agree_fully_and_null_rows_and_teachers_without_a_scale_not_at_all() -> None:
    images, texts = unit(3 * BATCH + 5, 4, seed=0), unit(3 * BATCH + 5, 4, seed=1)
    images[7], texts[700] = np.nan, np.nan
    targets = Targets({"a": 20.0, "b": 20.0})
    targets.add({"a": (images, texts), "b": (images, texts)})
    targets.finish()
    agreement = targets.agreements()
    assert len(agreement) == len(images)
    assert np.flatnonzero(np.isnan(agreement)).tolist() == [7, 700]
    np.testing.assert_allclose(agreement[~np.isnan(agreement)], 1, atol=1e-5)
    rows = {name: (unit(30, 4, seed=n), unit(30, 4, seed=n + 5)) for n, name in enumerate("ab")}
    targets = Targets({"a": 20.0, "b": None})
    targets.add(rows)
    targets.finish()
    assert np.isnan(targets.agreements()).all()
    assert len(targets.entropy("b")) == len(SCALES)
    assert targets.entropy("b") == sorted(targets.entropy("b"), reverse=True)


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


def rows_of(url: str) -> SampledRows:
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
