"""Inputs of the pipeline benchmark."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from benchmarks.pipeline.inputs import make_config, photo, write_shards
from reinforce.engine.plan.plan import make_plan
from tests.helpers.demo import read_samples


def test_photos_are_deterministic_jpegs() -> None:
    assert photo(1, side=64) == photo(1, side=64) != photo(2, side=64)
    with Image.open(io.BytesIO(photo(1, side=64))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))


def test_shards_repeat_photos_and_differ(tmp_path: Path) -> None:
    photos = [photo(i, side=64) for i in range(3)]
    source = write_shards(tmp_path / "source", 2, 4, photos)
    samples = [read_samples(tmp_path / "source" / f"0000{i}.tar") for i in range(2)]
    assert samples[0]["000001"] == {"jpg": photos[1], "txt": b"a photo of thing 1"}
    assert [sample["jpg"] for sample in samples[1].values()] == [photos[i] for i in (1, 2, 0, 1)]
    plan = make_plan(make_config(source, f"{tmp_path}/out", augmentations=10, cores=1))
    assert [shard.url for shard in plan.pending] == [f"{tmp_path}/source/0000{i}.tar" for i in range(2)]
