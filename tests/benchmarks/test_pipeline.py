"""Inputs and medians of the pipeline benchmark."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from benchmarks.pipeline import ROUNDS, FixedTimeTeacher, compare, photo, write_shard
from tests.helpers.demo import read_samples


def test_photos_are_deterministic_jpegs(tmp_path: Path) -> None:
    assert photo(1, side=64) == photo(1, side=64) != photo(2, side=64)
    with Image.open(io.BytesIO(photo(1, side=64))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    write_shard(tmp_path / "0.tar", [photo(1, side=64), photo(2, side=64)])
    samples = read_samples(tmp_path / "0.tar")
    assert samples["000001"] == {"jpg": photo(2, side=64), "txt": b"a photo of thing 1"}


def test_variants_alternate_and_medians_are_returned() -> None:
    calls: list[str] = []

    def variant(name: str, values: list[float]) -> float:
        calls.append(name)
        return values.pop()

    a, b = [5.0, 1.0, 4.0, 2.0, 3.0], [10.0] * ROUNDS
    assert compare({"a": lambda: variant("a", a), "b": lambda: variant("b", b)}) == {"a": 3.0, "b": 10.0}
    assert calls == ["a", "b"] * ROUNDS


def test_teacher_returns_unit_vectors() -> None:
    teacher = FixedTimeTeacher(torch.device("cpu"))
    vectors = teacher.encode_images(torch.zeros(3, 3, 4, 4))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert teacher.encode_texts(["a", "b"]).shape == (2, teacher.dim)
