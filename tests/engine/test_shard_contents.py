"""What the files of a dataset contain: rows in order, the models' values, nulls where a model fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.augment.records import replay
from reinforce.images.policy import decode
from reinforce.seeds import seed_for
from teachers.preprocessing.pixels import to_pixels
from tests.helpers.data import config_of, tree
from tests.helpers.models import ColorTeacher
from tests.helpers.reinforced import reinforce_here


def test_every_layer_has_the_rows_of_samples_in_their_order(shards: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    reinforce_here(config_of(shards(40, 7), output))
    layers = {p.parent.relative_to(output).as_posix() for p in output.rglob("*.parquet")} - {"index"}
    assert layers == {
        "samples",
        "captions/namer",
        *(f"embeddings/{t}/{what}" for t in ("red", "blue") for what in ("images", "caption", "namer")),
    }
    for samples in (output / "samples").glob("*.parquet"):
        keys = pq.read_table(samples)["key"].to_pylist()
        assert keys == sorted(keys)
        for layer in layers:
            file = pq.ParquetFile(output / layer / samples.name)
            assert file.read(["key"])["key"].to_pylist() == keys
            assert file.num_row_groups == pq.ParquetFile(samples).num_row_groups


def test_embeddings_equal_the_teachers_for_replayed_augmentations(shards: Callable[..., str], tmp_path: Path) -> None:
    reinforce_here(config_of(shards(20), tmp_path / "out"))
    teacher = ColorTeacher(torch.device("cpu"), size=16, dim=8)
    limits = parse_config(config_of("x", "y")).input.limits
    seen = 0
    for sample in reinforce.open(str(tmp_path / "out"), teachers=["red"]):
        image = decode(sample.image, limits)
        crops = np.stack([np.asarray(replay(image, record)) for record in sample.augmentations])
        expected = teacher.encode_images(to_pixels(torch.from_numpy(crops), teacher.image)).numpy()
        np.testing.assert_allclose(sample.images["red"], expected, atol=1e-3)
        assert sample.caption is not None
        np.testing.assert_allclose(
            sample.texts["red"]["caption"], teacher.encode_texts([sample.caption]).numpy(), atol=1e-3
        )
        captions = sample.captions["namer"]
        assert captions is not None
        assert len(captions) == 2
        np.testing.assert_allclose(sample.texts["red"]["namer"], teacher.encode_texts(captions).numpy(), atol=1e-3)
        assert sample.metadata is not None
        assert sample.metadata["uid"] == sample.key
        seen += 1
    assert seen == 20


def test_layers_that_are_added_to_images_by_reference_equal_those_of_a_fresh_dataset(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(20, 9), tmp_path / "fresh", images="reference")
    reinforce_here(config)
    grown = {**config, "output": str(tmp_path / "grown")}
    reinforce_here({**grown, "captioners": {}, "teachers": {"red": config["teachers"]["red"]}})
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown").rglob("*.parquet")}
    reinforce_here(grown)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    files, fresh = tree(tmp_path / "grown"), tree(tmp_path / "fresh")
    assert json.loads(files.pop("dataset.json")) == json.loads(fresh.pop("dataset.json"))
    assert files == fresh


def test_teachers_with_one_side_have_that_sides_layers_only(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(5), tmp_path / "out")
    config["teachers"] = {
        "eye": {"class": "tests.helpers.models:ImageOnly"},
        "ear": {"class": "tests.helpers.models:TextOnly"},
    }
    reinforce_here(config)
    folders = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out" / "embeddings").glob("*/*")}
    assert folders == {"embeddings/eye/images", "embeddings/ear/caption", "embeddings/ear/namer"}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-7), ("int8", 8e-3)])
def test_embeddings_are_stored_in_the_configured_dtype(
    shards: Callable[..., str], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    config = config_of(shards(6), tmp_path / "out")
    config["teachers"]["red"]["dtype"] = dtype
    reinforce_here(config)
    [file] = (tmp_path / "out" / "embeddings" / "red" / "caption").glob("*.parquet")
    assert str(np.dtype(dtype)) in str(pq.read_schema(file).field("embeddings").type).replace(
        "halffloat", "float16"
    ).replace("value_type=float,", "value_type=float32,")
    for sample in reinforce.open(str(tmp_path / "out"), teachers=["red"]):
        assert sample.caption is not None
        expected = ColorTeacher(torch.device("cpu")).encode_texts([sample.caption]).numpy()
        np.testing.assert_allclose(sample.texts["red"]["caption"], expected, atol=tolerance)


def test_a_row_whose_embedding_is_not_finite_is_null_and_quarantined(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(12), tmp_path / "out", captioners={})
    config["teachers"] = {
        "ill": {"class": "tests.helpers.models:FailingTeacher", "options": {"trigger": "thing 7 ", "failure": "nan"}},
        "red": config["teachers"]["red"],
    }
    reinforce_here(config)
    [path] = (tmp_path / "out" / "quarantine").rglob("*.parquet")
    assert pq.read_table(path)["reason"].to_pylist() == ["not_finite"]
    rows = {s.key: s for s in reinforce.open(str(tmp_path / "out"))}
    assert np.isnan(rows["00000007"].texts["ill"]["caption"]).all()
    assert np.isfinite(rows["00000007"].texts["red"]["caption"]).all()
    assert np.isfinite(rows["00000006"].texts["ill"]["caption"]).all()


def test_an_image_without_captions_is_null_and_quarantined_and_its_neighbours_are_not(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    captioner = {"class": "tests.helpers.models:NanCaptioner", "captions": 2}
    config = config_of(shards(12), tmp_path / "out", captioners={"ill": captioner})
    reinforce_here(config)
    samples = {s.key: s.captions["ill"] for s in reinforce.open(str(tmp_path / "out"))}
    without = [key for key in samples if seed_for(0, key, "captions/ill") % 4 == 1]
    assert 0 < len(without) < 12
    assert sorted(key for key, texts in samples.items() if texts is None) == sorted(without)
    assert all(len(texts) == 2 for texts in samples.values() if texts)
    [quarantined] = (tmp_path / "out" / "quarantine" / "captions" / "ill").glob("*.parquet")
    table = pq.read_table(quarantined)
    assert set(table["key"].to_pylist()) == set(without)
    assert set(table["reason"].to_pylist()) == {"not_finite"}
