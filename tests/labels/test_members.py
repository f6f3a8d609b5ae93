"""An unreadable member of published reinforcements costs its own row, is quarantined, and executes nothing."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import reinforce
from reinforce.labels.members import parse_vectors
from tests.helpers.published import (
    ALL,
    COUNT,
    DIMS,
    check_sample,
    config_of,
    npz,
    published_members,
    quarantine,
    source_members,
    write_published,
)
from tests.helpers.reinforced import reinforce_here


def paug(records: list[Any]) -> bytes:
    return json.dumps({"param_aug": records}).encode()


def without(array: str) -> bytes:
    return npz({name: value for name, value in ALL[0].vectors.items() if name != array})


def header_of(shape: tuple[int, ...]) -> bytes:
    """An npz whose header declares an array much larger than its data."""
    array, out = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("image_emb.npy", array.getvalue() + bytes(64))
    return out.getvalue()


def bomb(name: str = "image_emb.npy") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(name, bytes(100 * 2**20))
    return out.getvalue()


class Harm:
    """A pickle that creates a file when it is loaded."""

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
#: Defects of the first sample: the layer in whose quarantine it must be, and the changed members. What takes long to
#: make is made by a function, because every process of the tests imports this file.
BROKEN: dict[str, tuple[str, dict[str, bytes | Callable[[], bytes] | None]]] = {
    "no augmentations": ("samples", {"paug.json": None}),
    "augmentations that are no JSON": ("samples", {"paug.json": b"{"}),
    "augmentations nested too deeply": ("samples", {"paug.json": b"[" * 100_000}),
    "too few augmentations": ("samples", {"paug.json": paug(ALL[0].records[:2])}),
    "no crop": ("samples", {"paug.json": paug([[None, None]] * 3)}),
    "a crop of halves": ("samples", {"paug.json": paug([[[0.5, 0, 9, 9]]] * 3)}),
    "an empty crop": ("samples", {"paug.json": paug([[[0, 0, 0, 9]]] * 3)}),
    "a crop of another image": ("samples", {"paug.json": paug([[[0, 0, 31, 40], None]] * 3)}),
    "an operation that there is not": ("samples", {"paug.json": paug([[CROP, [[14, 1.0]]]] * 3)}),
    "an operation that is no number": ("samples", {"paug.json": paug([[CROP, [[True, 1.0]]]] * 3)}),
    "an operation without end": (
        "samples",
        {"paug.json": b'{"param_aug": [' + b", ".join([b"[[0, 0, 9, 9], [[1, 1e999]]]"] * 3) + b"]}"},
    ),
    "no captions": ("captions/coca", {"syn.json": None}),
    "captions that are none": ("captions/coca", {"syn.json": b'{"syn_text": [1, 2]}'}),
    "too few captions": ("captions/coca", {"syn.json": b'{"syn_text": ["one"]}'}),
    "no vectors": ("embeddings/one/images", {"npz": None}),
    "no vectors of images": ("embeddings/one/images", {"npz": without("image_emb")}),
    "no vectors of synthetic captions": ("embeddings/one/coca", {"npz": without("text_emb")}),
    "no zip": ("embeddings/one/images", {"npz": b"PK\x03\x04 and no more"}),
    "vectors of no length": ("embeddings/one/images", {"npz": npz({"image_emb": np.zeros((COUNT, sum(DIMS)))})}),
    "vectors that are too large": ("embeddings/one/images", {"npz": npz({"image_emb": np.full((COUNT, 10), 1e200)})}),
    "vectors with NaN": ("embeddings/one/images", {"npz": npz({"image_emb": np.full((COUNT, 10), np.nan)})}),
    "too few columns": ("embeddings/two/images", {"npz": npz({"image_emb": ALL[0].vectors["image_emb"][:, :8]})}),
    "vectors that are whole numbers": ("embeddings/one/images", {"npz": npz({"image_emb": np.ones((3, 10), int)})}),
    "a header that promises terabytes": ("embeddings/one/images", {"npz": header_of((2**20, 2**20))}),
    "an npz that unpacks to 100 MB": ("embeddings/one/images", {"npz": bomb}),
    "a pth.gz that unpacks to 100 MB": (
        "embeddings/one/images",
        {"npz": None, "pth.gz": lambda: gzip.compress(bytes(100 * 2**20), 1)},
    ),
    "a zip in a pth.gz that unpacks to 100 MB": (
        "embeddings/one/images",
        {"npz": None, "pth.gz": lambda: gzip.compress(bomb("archive/data/0"), 1)},
    ),
    "a pickle of an npz": ("embeddings/one/images", {"npz": harmful_npz()}),
    "a pickle of a pth.gz": ("embeddings/one/images", {"npz": None, "pth.gz": harmful_pth()}),
    "a bare pickle": ("embeddings/one/images", {"npz": None, "pth.gz": gzip.compress(pickle.dumps(Harm()))}),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_are_two_dimensional_float_arrays_of_any_memory_order(dtype: type, order: Literal["C", "F"]) -> None:
    values = np.asarray(np.arange(6).reshape(2, 3), dtype, order)
    data = npz({"values": values}, scalar=np.float32(1), whole=np.ones((2, 3), int), cube=np.ones((1, 1, 1)))
    [(name, parsed)] = parse_vectors("npz", data).items()
    assert (name, parsed.dtype) == ("values", np.float32)
    np.testing.assert_array_equal(parsed, values)


def test_an_unreadable_member_costs_its_own_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All defects in one shard, each between good samples."""
    monkeypatch.chdir(tmp_path)
    source, published = [source_members(ALL[0])], [published_members(ALL[0])]
    for number, (_, members) in enumerate(BROKEN.values(), 100):
        broken, good = (
            ALL[0]._replace(key=f"uid{number:05d}"),
            ALL[number % 11 + 1]._replace(key=f"uid{900 + number:05d}"),
        )
        changed = {name: member() if callable(member) else member for name, member in members.items()}
        source += [source_members(broken), source_members(good)]
        published += [published_members(broken, **changed), published_members(good)]
    write_published(tmp_path, source, published)
    samples = {sample.key: sample for sample in reinforce.open(reinforce_here(config_of(tmp_path)))}
    refused = {layer: quarantine(tmp_path, layer) for layer, _ in BROKEN.values()}
    for number, (defect, (layer, _)) in enumerate(BROKEN.items(), 100):
        key = f"uid{number:05d}"
        assert (key, "reinforcement_broken") in refused[layer], defect
        assert (key in samples) == (layer != "samples"), defect
        assert not layer.endswith("images") or np.isnan(samples[key].images[layer.split("/")[1]]).all(), defect
        good, found = ALL[number % 11 + 1].vectors["image_emb"][:, :6], samples[f"uid{900 + number:05d}"].images["one"]
        np.testing.assert_allclose(found, good, atol=1e-6)
    check_sample(ALL[0], samples[ALL[0].key])
    assert not (tmp_path / "harmed").exists()
