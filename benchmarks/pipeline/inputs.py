"""Photograph-like images in shards, and the config that they are processed with. Imports no torch."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reinforce.config import Config, parse_config

SIZE = 224


def photo(seed: int, side: int = 512) -> bytes:
    """Return a JPEG with about as much detail as a photograph: smooth shapes and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray((rng.random((16, 16, 3)) * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, np.int16) + rng.normal(0, 8, (side, side, 3)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shard(path: Path, photos: Sequence[bytes]) -> None:
    """Write a tar of photos with captions."""
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(photos):
            for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.txt", f"a photo of thing {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, shards: int, images: int, photos: Sequence[bytes]) -> str:
    """Write ``shards`` tars of ``images`` photos each, which repeat; return their URL."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        write_shard(folder / f"{shard:05d}.tar", [photos[(shard + i) % len(photos)] for i in range(images)])
    return f"{folder}/*.tar"


def make_config(source: str, output: str, augmentations: int, cores: int, batch: int = 256) -> Config:
    """The config of a run with one teacher of a fixed time."""
    return parse_config(
        {
            "source": source,
            "output": output,
            "augmentations": {"count": augmentations, "size": SIZE},
            "teachers": {"fixed": {"class": "benchmarks.pipeline.stand_ins:FixedTimeTeacher"}},
            "workers": {"cpus": cores, "gpus": 0, "batch": batch},
        }
    )
