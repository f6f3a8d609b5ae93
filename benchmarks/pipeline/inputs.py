"""Photograph-like images in shards, and the config that they are processed with. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.stored import write_tar
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


def write_shards(folder: Path, shards: int, images: int, photos: Sequence[bytes]) -> str:
    """Write ``shards`` tars of ``images`` photos with captions each, which repeat; return their URL."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        samples = (
            (f"{i:06d}", {"jpg": photos[(shard + i) % len(photos)], "txt": f"a photo of thing {i}".encode()})
            for i in range(images)
        )
        write_tar(folder / f"{shard:05d}.tar", samples)
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
