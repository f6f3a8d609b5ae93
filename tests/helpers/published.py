"""Small shards in the format of DataCompDR, with random vectors."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

import reinforce
from reinforce.dataset.store import Store
from reinforce.images.records import OPS
from tests.helpers import data
from tests.helpers.data import picture, write_tar

COUNT, CAPTIONS, DIMS = 3, 2, (6, 4)
WIDTH, HEIGHT, SIZE = 40, 30, 24


class PublishedSample(NamedTuple):
    """The published reinforcements of one image."""

    key: str
    records: list[Any]
    captions: dict[str, list[str]]
    vectors: dict[str, np.ndarray]


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, sum of DIMS]: unit vectors of all teachers, concatenated."""
    parts = [rng.normal(size=(count, dim)) for dim in DIMS]
    return np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], 1).astype(np.float32)


def published_sample(number: int) -> PublishedSample:
    rng = np.random.default_rng(number)
    records = []
    for _ in range(COUNT):
        height, width = int(rng.integers(5, HEIGHT)), int(rng.integers(5, WIDTH))
        top, left = int(rng.integers(HEIGHT - height + 1)), int(rng.integers(WIDTH - width + 1))
        ops = [[int(rng.integers(len(OPS))), float(rng.integers(1, 4))] for _ in range(2)]
        records.append([[top, left, height, width], ops if rng.random() < 0.8 else None])
    key = f"uid{number:05d}"
    captions = {"syn_text": [f"a drawing {key} {n}" for n in range(CAPTIONS)], "syn_text_tagged": [f"tagged {key}"]}
    vectors = {
        "image_emb": unit(rng, COUNT),
        "text_emb": unit(rng, 1 + CAPTIONS),
        "syn_text_tagged_emb": unit(rng, 1),
    }
    return PublishedSample(key, records, captions, vectors)


def npz(arrays: dict[str, np.ndarray], **others: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays, **others)
    return out.getvalue()


def pth(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, out)
    return gzip.compress(out.getvalue())


def published_members(one: PublishedSample, packed: str = "npz", **changed: bytes | None) -> list[tuple[str, bytes]]:
    """The members of a sample of the published tar. ``changed`` replaces members by extension, None removes one."""
    members: dict[str, bytes | None] = {
        "url.txt": b"https://example.org/image.jpg",
        "syn.json": json.dumps(one.captions).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(one.records) if packed == "npz" else one.records}).encode(),
        packed: npz(one.vectors) if packed == "npz" else pth(one.vectors),
        "json": json.dumps({"uid": one.key, "sha256": "0" * 64}).encode(),
        **changed,
    }
    return [(f"{one.key}.{name}", content) for name, content in members.items() if content is not None]


def source_members(one: PublishedSample, key: str | None = None, **members: bytes) -> list[tuple[str, bytes]]:
    """The members of a sample of the source, with its uid in json."""
    number = int(one.key[3:])
    found = {"png": picture(number, WIDTH, HEIGHT), "txt": f"true {one.key}".encode()}
    found |= {"json": json.dumps({"uid": one.key}).encode(), **members}
    return [(f"{key or one.key}.{name}", content) for name, content in found.items()]


def write_published(
    folder: Path, source: list[list[tuple[str, bytes]]], reinforcements: list[list[tuple[str, bytes]]]
) -> None:
    """Write one source shard and one published shard, from the members of their samples."""
    write_tar(folder / "source" / "00000.tar", [*itertools.chain(*source)])
    write_tar(folder / "dr" / "00000.tar", [*itertools.chain(*reinforcements)])


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config that reads both shards."""
    own: dict[str, Any] = {
        "reinforcements": f"{folder}/dr/*.tar",
        "augmentations": {"count": COUNT, "size": SIZE},
        "captioners": {"coca": {"family": "published", "model": "syn_text", "captions": CAPTIONS}},
        "teachers": {
            "one": {"family": "published", "model": "ONE", "columns": [0, 6], "logit_scale": 70, "codec": "float32"},
            "two": {"family": "published", "model": "TWO", "columns": [6, 10], "logit_scale": 60, "codec": "float32"},
        },
    }
    return {**data.config_of(f"{folder}/source/*.tar", f"{folder}/out"), **own, **changes}


ALL = [published_sample(number) for number in range(12)]


def quarantine(folder: Path, layer: str = "samples") -> list[tuple[str | None, str]]:
    store = Store(f"{folder}/out")
    return [
        (row["key"], str(row["reason"]))
        for shard in store.shards(f"quarantine/{layer}")
        for row in store.quarantined(layer, shard)
    ]


def check_sample(one: PublishedSample, sample: reinforce.Sample, tolerance: float = 1e-6) -> None:
    """Assert that a sample of the dataset has the published values."""
    first, second = slice(0, DIMS[0]), slice(DIMS[0], sum(DIMS))
    for teacher, columns in (("one", first), ("two", second)):
        np.testing.assert_allclose(sample.images[teacher], one.vectors["image_emb"][:, columns], atol=tolerance)
        texts = one.vectors["text_emb"][:, columns]
        np.testing.assert_allclose(sample.texts[teacher]["caption"], texts[:1], atol=tolerance)
        np.testing.assert_allclose(sample.texts[teacher]["coca"], texts[1:], atol=tolerance)
    assert sample.caption == f"true {one.key}"
    assert sample.captions["coca"] == one.captions["syn_text"]
    records = [
        [
            [a.crop.top, a.crop.left, a.crop.height, a.crop.width],
            a.ops and [[OPS.index(o.name), o.magnitude] for o in a.ops],
        ]
        for a in sample.augmentations
    ]
    assert records == one.records
    assert {a.size for a in sample.augmentations} == {SIZE}


def torchvision_replay(data: bytes, record: Any, size: int) -> np.ndarray:
    """Replay a published augmentation record on an encoded image with only Pillow and torchvision."""
    crop, ops = record
    view = F.resized_crop(Image.open(io.BytesIO(data)).convert("RGB"), *crop, [size, size], InterpolationMode.BICUBIC)
    for number, magnitude in ops or []:
        view = _apply_op(view, OPS[number], magnitude, InterpolationMode.NEAREST, None)
    return np.asarray(view)
