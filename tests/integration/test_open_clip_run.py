"""The real families end to end: open_clip teachers of two sizes, a transformers teacher and a CoCa captioner."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import reinforce
from reinforce.dataset.augment.records import from_records, replay
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.tiny_coca import coca_model
from tests.helpers.tiny_models import open_clip_model, transformers_siglip


@pytest.fixture(scope="module")
def config(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a run that has finished."""
    tmp_path = tmp_path_factory.mktemp("run")
    for shard, size in enumerate((12, 5)):
        write_tar(tmp_path / "source" / f"{shard:05d}.tar", members_of(shard, size))
    small = open_clip_model(tmp_path / "small", image_size=32, width=32, embed_dim=16, seed=0)
    large = open_clip_model(tmp_path / "large", image_size=48, width=48, embed_dim=24, seed=1)
    coca = {"model": coca_model(tmp_path / "coca"), "captions": 3, "max_length": 12}
    teachers = {
        "small": {"model": small, "dtype": "float32"},
        "large": {"model": large},
        "siglip": {"family": "transformers", "model": transformers_siglip(tmp_path / "siglip")},
    }
    made = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={"coca": coca}, teachers=teachers)
    made["augmentations"] = {"count": 2, "size": 32}
    assert reinforce.run(made).status == 0
    return made


def test_stored_embeddings_equal_open_clips_for_the_replayed_image_and_the_captions(
    config: dict[str, Any],
) -> None:
    out = Path(config["output"])
    name = config["teachers"]["small"]["model"]
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    [shard] = [p.name for p in (out / "samples").glob("00000-*.parquet")]
    samples = pq.read_table(out / "samples" / shard)
    captions = pq.read_table(out / "captions" / "coca" / shard)["captions"].to_pylist()

    def stored(what: str) -> np.ndarray:
        column = pq.read_table(out / "embeddings" / "small" / what / shard)["embeddings"]
        return column.combine_chunks().to_numpy_ndarray()

    for row, sample in enumerate(samples.to_pylist()):
        image = Image.open(io.BytesIO(sample["image"])).convert("RGB")
        crops = [preprocess(replay(image, record)) for record in from_records(sample["augmentations"])]
        with torch.no_grad():
            images = model.encode_image(torch.stack(crops), normalize=True).numpy()
            texts = model.encode_text(tokenizer([sample["caption"], *captions[row]]), normalize=True).numpy()
        np.testing.assert_allclose(stored("images")[row], images, atol=1e-5)
        np.testing.assert_allclose(stored("caption")[row], texts[:1], atol=1e-5)
        np.testing.assert_allclose(stored("coca")[row], texts[1:], atol=1e-5)


def test_ensembles_of_different_sizes_families_and_dimensions_work(config: dict[str, Any]) -> None:
    data = reinforce.open(config["output"])
    shapes = {name: teacher["dim"] for name, teacher in data.manifest["teachers"].items()}
    count = 0
    for sample in data:
        captions = sample.captions["coca"]
        assert captions is not None
        assert len(captions) == 3
        assert all(isinstance(text, str) for text in captions)
        for teacher, dim in shapes.items():
            assert sample.images[teacher].shape == (2, dim)
            assert sample.texts[teacher]["caption"].shape == (1, dim)
            assert sample.texts[teacher]["coca"].shape == (3, dim)
            np.testing.assert_allclose(np.linalg.norm(sample.images[teacher], axis=-1), 1, atol=2e-3)
        count += 1
    assert (count, len(set(shapes.values()))) == (17, len(shapes))
