"""The index of a teacher: recall of its neighbours by the vectors of other models."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.settings import parse
from teachers.protocols import ImageSpec
from tests.helpers.evaluation import CPU, encode_png, make_evaluator, write_shard

IMAGES = 24


class Pixels:
    """The colours of four pixels as a vector; without a text side."""

    image = ImageSpec(2, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), "nearest", "squash")

    def __init__(self, device: Any = None, dim: int = 12, broken: bool = False) -> None:
        self.dim, self.logit_scale, self.broken = dim, 10.0, broken

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        vectors = pixels.flatten(1)[:, : self.dim]
        return torch.nn.functional.normalize(vectors / (0.0 if self.broken else 1.0), dim=1)


TEACHER = "class:tests.evaluation.test_index:Pixels"


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    images = [encode_png(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)) for _ in range(IMAGES)]
    return write_shard(tmp_path_factory.mktemp("index") / "a.tar", [(f"{n:02}", i, {}) for n, i in enumerate(images)])


def index(images: str, **keys: Any) -> dict[str, Any]:
    return {"index": {"set": {"images": images, "teacher": TEACHER, "k": [1, 5], **keys}}}


def vectors_of(shard: str) -> torch.Tensor:
    """The teacher's vectors [N, 12]."""
    with tarfile.open(shard) as tar:
        pixels = [np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read()))) for m in tar]  # type: ignore[union-attr]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5
    return Pixels().encode_images(batch)


def test_the_teacher_finds_all_of_its_own_neighbours_and_another_model_as_many_as_a_plain_search(shard: str) -> None:
    config = parse(Evaluation, index(shard))
    assert config.metrics == ["index/set/k1/recall", "index/set/k5/recall"]
    evaluator = make_evaluator(**index(shard), batch=7)
    assert {*evaluator.evaluate(Pixels(), CPU).metrics.values()} == {1.0}

    stored = vectors_of(shard)
    noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
    queries = torch.nn.functional.normalize(stored + 0.2 * noise, dim=1)
    found = evaluator.evaluate(Fixed(queries), CPU)
    for count in (1, 5):
        expected = []
        for row in range(IMAGES):
            near = [(-(rows[row] @ stored.T)).argsort().tolist() for rows in (stored, queries)]
            of_teacher, of_model = ([n for n in one if n != row][:count] for one in near)
            expected.append(len({*of_teacher} & {*of_model}) / count)
        assert found.metrics[f"index/set/k{count}/recall"] == pytest.approx(np.mean(expected))
    assert 0.1 < found.metrics["index/set/k5/recall"] < 1
    assert str(found.sets["index/set"]) == f"{IMAGES} images"


class Fixed(Pixels):
    """Gives the rows of a tensor in turn."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.next = rows, 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        first, self.next = self.next, self.next + len(pixels)
        return self.rows[first : self.next]


def test_the_teacher_encodes_the_images_once_for_all_models(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, encode, encoded = vectors_of(shard), Pixels.encode_images, list[int]()

    def count(self: Pixels, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Pixels, "encode_images", count)
    evaluator = make_evaluator(**index(shard))
    for _ in range(3):
        evaluator.evaluate(Fixed(stored), CPU)
    assert sum(encoded) == IMAGES


def test_another_space_a_faulty_teacher_and_too_few_images_are_reported(shard: str, tmp_path: Path) -> None:
    evaluator = make_evaluator(**index(shard))
    found = evaluator.evaluate(Pixels(dim=6), CPU)
    assert found.metrics == {}
    assert "6 dimensions and those of class:tests.evaluation.test_index:Pixels 12" in found.failed["index/set"]
    assert "embeddings are not finite" in evaluator.evaluate(Pixels(broken=True), CPU).failed["index/set"]
    run = tmp_path / "run.yaml"
    options = {"class": TEACHER.removeprefix("class:"), "options": {"broken": True}}
    run.write_text(json.dumps({"teachers": {"t": options}}))
    with pytest.raises(UserError, match=r"index/set: .*run\.yaml:t: 24 of 24 image embeddings are not finite"):
        make_evaluator(**index(shard, teacher=f"{run}:t")).evaluate(Pixels(), CPU)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"k": [30]}, r"index/set: k of 30 neighbours needs 31 images, and 24 are usable"),
        ({"limit": 5}, "needs 6 images, and 5 are usable"),
        ({"teacher": f"{run}:other"}, r"has no teacher 'other'; it has t"),
        ({"teacher": "local-dir:/nowhere"}, "folder /nowhere does not exist"),
    ]
    for keys, message in refused:
        with pytest.raises(UserError, match=message):
            make_evaluator(**index(shard, **keys))
