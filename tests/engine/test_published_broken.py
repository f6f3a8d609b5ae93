"""What cannot be read of published reinforcements costs its own row, is told, and does no harm."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reinforce
from tests.helpers.published import (
    ALL,
    COUNT,
    DIMS,
    check,
    config_of,
    image,
    npz,
    published,
    quarantine,
    reinforcement,
)
from tests.helpers.reinforced import reinforce_here


def paug(records: list[Any]) -> bytes:
    return json.dumps({"param_aug": records}).encode()


def without(array: str) -> bytes:
    return npz({name: value for name, value in ALL[0].vectors.items() if name != array})


def header_of(shape: tuple[int, ...]) -> bytes:
    """An npz whose array says that it is much larger than it is."""
    array, out = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("image_emb.npy", array.getvalue() + bytes(64))
    return out.getvalue()


def bomb(name: str = "image_emb.npy") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, bytes(100 * 2**20))
    return out.getvalue()


class Harm:
    """A pickle that would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('harmed', 'w').close()",)


def harmful_npz() -> bytes:
    array = np.empty(1, object)
    array[0] = Harm()
    return npz({}, image_emb=array)


def harmful_pth() -> bytes:
    out = io.BytesIO()
    torch.save({"image_emb": Harm()}, out)
    return gzip.compress(out.getvalue())


CROP = [0, 0, 10, 10]
#: What is wrong with the first of the samples, and in which layer's quarantine it is for that.
BROKEN: dict[str, tuple[str, dict[str, bytes | None]]] = {
    "no augmentations": ("samples", {"paug.json": None}),
    "augmentations that are no JSON": ("samples", {"paug.json": b"{"}),
    "augmentations nested too deeply": ("samples", {"paug.json": b"[" * 100_000}),
    "too few augmentations": (
        "samples",
        {"paug.json": paug(ALL[0].records[:2])},
    ),
    "no crop": ("samples", {"paug.json": paug([[None, None]] * 3)}),
    "a crop of halves": (
        "samples",
        {"paug.json": paug([[[0.5, 0, 9, 9]]] * 3)},
    ),
    "an empty crop": ("samples", {"paug.json": paug([[[0, 0, 0, 9]]] * 3)}),
    "a crop of another image": (
        "samples",
        {"paug.json": paug([[[0, 0, 31, 40], None]] * 3)},
    ),
    "an operation that there is not": (
        "samples",
        {"paug.json": paug([[CROP, [[14, 1.0]]]] * 3)},
    ),
    "an operation without end": (
        "samples",
        {"paug.json": b'{"param_aug": [' + b", ".join([b"[[0, 0, 9, 9], [[1, 1e999]]]"] * 3) + b"]}"},
    ),
    "no captions": ("captions/coca", {"syn.json": None}),
    "captions that are none": ("captions/coca", {"syn.json": b'{"syn_text": [1, 2]}'}),
    "too few captions": ("captions/coca", {"syn.json": b'{"syn_text": ["one"]}'}),
    "no vectors": ("embeddings/one/images", {"npz": None}),
    "no vectors of images": ("embeddings/one/images", {"npz": without("image_emb")}),
    "no vectors of texts": ("embeddings/one/caption", {"npz": without("text_emb")}),
    "no zip": ("embeddings/one/images", {"npz": b"PK\x03\x04 and no more"}),
    "vectors of no length": ("embeddings/one/images", {"npz": npz({"image_emb": np.zeros((COUNT, sum(DIMS)))})}),
    "vectors that are too large": ("embeddings/one/images", {"npz": npz({"image_emb": np.full((COUNT, 10), 1e200)})}),
    "vectors with NaN": ("embeddings/one/images", {"npz": npz({"image_emb": np.full((COUNT, 10), np.nan)})}),
    "too few columns": ("embeddings/two/images", {"npz": npz({"image_emb": ALL[0].vectors["image_emb"][:, :8]})}),
    "vectors that are whole numbers": ("embeddings/one/images", {"npz": npz({"image_emb": np.ones((3, 10), int)})}),
    "a header that promises terabytes": ("embeddings/one/images", {"npz": header_of((2**20, 2**20))}),
    "an npz that unpacks to 100 MB": ("embeddings/one/images", {"npz": bomb()}),
    "a pth.gz that unpacks to 100 MB": (
        "embeddings/one/images",
        {"npz": None, "pth.gz": gzip.compress(bytes(100 * 2**20))},
    ),
    "a zip in a pth.gz that unpacks to 100 MB": (
        "embeddings/one/images",
        {"npz": None, "pth.gz": gzip.compress(bomb("archive/data/0"))},
    ),
    "a pickle of an npz": ("embeddings/one/images", {"npz": harmful_npz()}),
    "a pickle of a pth.gz": ("embeddings/one/images", {"npz": None, "pth.gz": harmful_pth()}),
    "a bare pickle": ("embeddings/one/images", {"npz": None, "pth.gz": gzip.compress(pickle.dumps(Harm()))}),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_what_cannot_be_read_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    monkeypatch.chdir(tmp_path)
    layer, changed = BROKEN[defect]
    published(
        tmp_path, [image(one) for one in ALL[:3]], [reinforcement(ALL[0], **changed), *map(reinforcement, ALL[1:3])]
    )
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path))))
    assert (ALL[0].key, "reinforcement_broken") in quarantine(tmp_path, layer)
    assert len(samples) == (2 if layer == "samples" else 3)
    for one, sample in zip(ALL[1:3], samples[-2:], strict=True):
        check(one, sample)
    if layer.endswith("images"):
        assert np.isnan(samples[0].images[layer.split("/")[1]]).all()
    assert not (tmp_path / "harmed").exists()


def test_the_harm_would_be_done_elsewhere(tmp_path: Path) -> None:
    """That is, the files above do hold what they are there for."""
    (tmp_path / "x.npz").write_bytes(harmful_npz())
    code = "import numpy; numpy.load('x.npz', allow_pickle=True)['image_emb']"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "harmed").exists()
