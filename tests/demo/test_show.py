"""The view of a dataset."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import schemas
from reinforce.config import Augmentations
from reinforce.dataset.augment import sample_augmentation, to_records
from reinforce.demo.show import show_dataset
from reinforce.demo.styles import PIXELS
from reinforce.errors import UserError
from tests.helpers.demo import read_samples


def write_dataset(root: Path, shard: Path) -> list[str]:
    """Write three rows of a shard as a run does; return their keys."""
    samples = dict(list(read_samples(shard).items())[:3])
    policy = Augmentations(count=2, size=48)
    rows = [
        {
            "key": key,
            "caption": members["txt"].decode(),
            "metadata": members["json"].decode(),
            "width": PIXELS,
            "height": PIXELS,
            "image": members["png"],
            "augmentations": to_records([sample_augmentation(policy, 0, key, k, PIXELS, PIXELS) for k in range(2)]),
        }
        for key, members in samples.items()
    ]
    vectors = np.eye(64, dtype=np.float16)[:6].reshape(3, 2, 64)
    layers = {
        "samples": pa.Table.from_pylist(rows, schema=schemas.samples_schema("embed")),
        "captions/coca": pa.Table.from_pylist(
            [{"key": key, "captions": ["first words", "second words"]} for key in samples],
            schema=schemas.captions_schema(),
        ),
        "embeddings/conv-64/images": pa.table(
            [pa.array(list(samples)), pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)],
            schema=schemas.embeddings_schema(2, 64, "float16"),
        ),
    }
    for name, table in layers.items():
        (root / name).mkdir(parents=True)
        pq.write_table(table, root / name / "00000.parquet")
    return list(samples)


def test_show_prints_layers_and_a_sample_and_draws_a_contact_sheet(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = write_dataset(tmp_path / "dataset", shards[0])
    show_dataset(tmp_path / "dataset", tmp_path / "sample.png")
    printed = capsys.readouterr().out
    for text in (
        "samples/",
        "captions/coca/",
        "embeddings/conv-64/images/",
        keys[0],
        "'second words'",
    ):
        assert text in printed
    assert "[2, 64] float16, mean norm 1.000" in printed
    assert len(re.findall(r"resized to 48 x 48", printed)) == 2
    with Image.open(tmp_path / "sample.png") as sheet:
        assert sheet.width > 700
        assert len(sheet.getcolors(maxcolors=2**20) or []) > 50


def test_show_without_a_dataset_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("reinforce run configs/demo.yaml")):
        show_dataset(tmp_path, tmp_path / "sample.png")
