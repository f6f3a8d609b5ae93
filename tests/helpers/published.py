"""Shards as DataCompDR's are, small and with vectors by chance: what is stored is known, and nothing else is."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import reinforce
from reinforce.dataset.augment import OPS
from reinforce.dataset.store import Store
from tests.helpers import data as conftest
from tests.helpers.data import picture, write_tar

COUNT, CAPTIONS, DIMS = 3, 2, (6, 4)
WIDTH, HEIGHT, SIZE = 40, 30, 24


class Stored(NamedTuple):
    """What is published of one image."""

    key: str
    records: list[Any]
    captions: dict[str, list[str]]
    vectors: dict[str, np.ndarray]


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, sum of DIMS]: a unit vector of each teacher, end to end."""
    parts = [rng.normal(size=(count, dim)) for dim in DIMS]
    return np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], 1).astype(np.float32)


def stored(number: int) -> Stored:
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
    return Stored(key, records, captions, vectors)


def npz(arrays: dict[str, np.ndarray], **others: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays, **others)
    return out.getvalue()


def pth(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, out)
    return gzip.compress(out.getvalue())


def reinforcement(one: Stored, packed: str = "npz", **changed: bytes | None) -> list[tuple[str, bytes]]:
    """The members of a sample of the published tar; ``changed`` replaces or leaves out some by extension."""
    members: dict[str, bytes | None] = {
        "url.txt": b"https://example.org/image.jpg",
        "syn.json": json.dumps(one.captions).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(one.records) if packed == "npz" else one.records}).encode(),
        packed: npz(one.vectors) if packed == "npz" else pth(one.vectors),
        "json": json.dumps({"uid": one.key, "sha256": "0" * 64}).encode(),
        **changed,
    }
    return [(f"{one.key}.{name}", data) for name, data in members.items() if data is not None]


def image(one: Stored, key: str | None = None, **members: bytes) -> list[tuple[str, bytes]]:
    """The members of a sample of the source; under another ``key`` its json tells the uid."""
    number = int(one.key[3:])
    found = [("png", picture(number, WIDTH, HEIGHT)), ("txt", f"true {one.key}".encode())]
    if key is not None:
        found.append(("json", json.dumps({"uid": one.key}).encode()))
    return [(f"{key or one.key}.{name}", data) for name, data in [*found, *members.items()]]


def published(
    folder: Path, source: list[list[tuple[str, bytes]]], reinforcements: list[list[tuple[str, bytes]]]
) -> None:
    """One shard of each, of samples by their members."""
    write_tar(folder / "source" / "00000.tar", [*itertools.chain(*source)])
    write_tar(folder / "dr" / "00000.tar", [*itertools.chain(*reinforcements)])


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """The config that reads them."""
    own: dict[str, Any] = {
        "reinforcements": f"{folder}/dr/*.tar",
        "augmentations": {"count": COUNT, "size": SIZE},
        "captioners": {"coca": {"family": "published", "model": "syn_text", "captions": CAPTIONS}},
        "teachers": {
            "one": {"family": "published", "model": "ONE", "columns": [0, 6], "logit_scale": 70, "dtype": "float32"},
            "two": {"family": "published", "model": "TWO", "columns": [6, 10], "logit_scale": 60, "dtype": "float32"},
        },
    }
    return {**conftest.config_of(f"{folder}/source/*.tar", f"{folder}/out"), **own, **changes}


ALL = [stored(number) for number in range(12)]


def quarantine(folder: Path, layer: str = "samples") -> list[tuple[str | None, str]]:
    store = Store(f"{folder}/out")
    return [
        (row["key"], str(row["reason"]))
        for shard in store.shards(f"quarantine/{layer}")
        for row in store.quarantined(layer, shard)
    ]


def check(one: Stored, sample: reinforce.Sample, tolerance: float = 1e-6) -> None:
    """A sample of the dataset is what was published."""
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
