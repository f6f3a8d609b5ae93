"""Small evaluation sets with known answers, also as suites publish them, and dual encoders that solve or fail them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from reinforce import settings
from reinforce.evaluation import reading
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Encoder
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.kinds import retrieval
from reinforce.evaluation.kinds.base import ImageSet
from reinforce.evaluation.kinds.retrieval import RetrievalSet
from reinforce.evaluation.registry import SuiteSet, select_sets
from reinforce.source.config import Limits
from teachers.open_clip.teacher import OpenClipTeacher, image_spec
from teachers.protocols import ImageSpec
from teachers.registry import teacher_spec
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import picture, write_tar
from tests.helpers.images import encode
from tests.helpers.models import tiny_models

CPU = Accelerator("cpu")
COLOURS = {
    "blue": (0, 0, 250),
    "green": (0, 250, 0),
    "grey": (120, 120, 120),
    "red": (250, 0, 0),
    "violet": (250, 0, 250),
    "yellow": (250, 250, 0),
}


def solid_image(colour: str, shade: int = 0) -> bytes:
    """A PNG of one colour; shades differ slightly."""
    red, green, blue = COLOURS[colour]
    return encode_png(np.full((20, 30, 3), (red, green, blue), np.uint8) + np.uint8(shade))


def encode_png(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels))


def write_colour_folder(root: Path, each: int = 2) -> str:
    """Write a folder with one class folder per colour."""
    for colour in COLOURS:
        for shade in range(each):
            path = root / colour / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(solid_image(colour, shade))
    return str(root)


def write_shard(path: Path, samples: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> str:
    """Write samples of (key, image, {extension: text or JSON value}) as a tar."""
    members = []
    for key, image, sidecars in samples:
        members.append((f"{key}.png", image))
        for extension, value in sidecars.items():
            text = value if isinstance(value, str) else json.dumps(value)
            members.append((f"{key}.{extension}", text.encode()))
    return str(write_tar(path, members))


def write_colour_shard(path: Path, each: int = 2) -> str:
    """Write the images of ``write_colour_folder`` in its order, each with its class index, class name and a caption."""
    samples = []
    for index, colour in enumerate(COLOURS):
        for shade in range(each):
            sidecar = {"class": colour, "group": "bright" if max(COLOURS[colour]) == 250 else "dull"}
            texts = {"cls": str(index), "txt": f"a photo of {colour} paint, {shade}", "json": sidecar}
            samples.append((f"{index}{shade}", solid_image(colour, shade), texts))
    return write_shard(path, samples)


def write_models(root: Path) -> dict[str, str]:
    """Write a tiny open_clip model for each way to resize -> open_clip names."""
    squash = {"resize_mode": "squash", "mean": 0.5, "std": 0.5, "interpolation": "bilinear"}
    return {
        "shortest": tiny_models.open_clip_model(root / "shortest"),
        "squash": tiny_models.open_clip_model(root / "squash", image_size=24, seed=1, preprocess=squash),
    }


def load_teacher(name: str, accelerator: Accelerator = CPU) -> OpenClipTeacher:
    return OpenClipTeacher(teacher_spec(model=name), accelerator)


def load_spec(model: torch.nn.Module) -> ImageSpec:
    """Preprocessing of an open_clip model."""
    return image_spec(open_clip.get_model_preprocess_cfg(model))


def make_photos() -> list[bytes]:
    """Pictures of several shapes and formats."""
    shapes = [(40, 30, "PNG"), (30, 40, "JPEG"), (24, 24, "PNG"), (90, 31, "JPEG"), (17, 50, "WEBP"), (33, 33, "JPEG")]
    return [picture(seed, width, height, kind) for seed, (width, height, kind) in enumerate(shapes * 3)]


def make_evaluator(**config: Any) -> Evaluator:
    return Evaluator(settings.parse(Evaluation, {"batch": 5, **config}), threads=2)


def open_retrieval(config: RetrievalSet) -> ImageSet:
    assert retrieval.RETRIEVAL.open_own is not None
    return retrieval.RETRIEVAL.open_own(config, "set", Limits(), ())


def evaluate_zero_shot(model: Encoder, url: str, **config: Any) -> dict[str, float]:
    """Scores of one classification set."""
    result = make_evaluator(zero_shot={"set": {"images": url, **config}}).evaluate(model, CPU)
    return {name.rpartition("/")[2]: score for name, score in result.metrics.items()}


class ColourOracle:
    """Embeds images by mean colour and texts by colour name; always right about solid images."""

    image: ImageSpec | None = ImageSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        means = pixels.mean((2, 3))
        colours = torch.tensor([*COLOURS.values()]) / 255
        nearest = torch.cdist(means, colours).argmin(1)
        return torch.eye(len(COLOURS))[nearest]

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self._encode_text(text) for text in texts])

    def _encode_text(self, text: str) -> torch.Tensor:
        first = next(colour for colour in COLOURS if colour in text)
        return torch.eye(len(COLOURS))[list(COLOURS).index(first)]


class ConstantEncoder(ColourOracle):
    """Returns the same embedding for every image and text."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.eye(4)[[0] * len(pixels)]

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.eye(4)[[0] * len(texts)]


class NanEncoder(ConstantEncoder):
    """Returns NaN for images, as a diverged model does."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_images(pixels) * torch.nan


class RedNanEncoder(ColourOracle):
    """Returns NaN for red images and, with ``texts``, for texts about red things."""

    def __init__(self, texts: bool = False) -> None:
        self.texts = texts

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._spoil(super().encode_images(pixels))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        found = super().encode_texts(texts)
        return self._spoil(found) if self.texts else found

    def _spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        red = vectors[:, list(COLOURS).index("red"), None] > 0
        return torch.where(red, torch.nan, vectors)


#: Samples of a set: (class index, image, metadata or None).
Samples = Sequence[tuple[object, bytes, Sequence[int] | None]]


def find_set(key: str) -> SuiteSet:
    """The set of a key, of the last part of one, or of a name, in any suite."""
    sets = [one for suite in ("datacomp", "sugarcrepe", "long-captions", "xm3600") for one in select_sets(suite)]
    return next(one for one in sets if one.key.endswith(key) or one.name.lower() == key)


def colour_samples(each: int = 2) -> list[tuple[object, bytes, Sequence[int] | None]]:
    """Solid images of all colours with their class indices, without metadata."""
    return [(index, solid_image(colour, shade), None) for index, colour in enumerate(COLOURS) for shade in range(each)]


def write_classification(
    root: Path,
    key: str,
    samples: Samples,
    classes: Sequence[str] = tuple(COLOURS),
    templates: Sequence[str] = ("a photo of {c}.", "{c}"),
    shards: int = 2,
) -> Path:
    """Write a set with its samples in turn in ``shards`` tars -> its folder."""
    folder = root / find_set(key).folder
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        members = []
        for number, (label, image, metadata) in list(enumerate(samples))[shard::shards]:
            members += [(f"s{number:07}.webp", image), (f"s{number:07}.cls", str(label).encode())]
            if metadata is not None:
                members.append((f"s{number:07}.npy", npy(np.array(metadata))))
        write_tar(folder / "test" / f"{shard}.tar", members)
    return folder


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_table(root: Path, key: str, columns: dict[str, list[Any]]) -> Path:
    """Write a set as one Parquet file, where the branch refs/convert/parquet has it -> the file."""
    path = root / find_set(key).folder / "TEST" / "test" / "0000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_urban1k(root: Path, captions: Mapping[str, tuple[str, str]]) -> None:
    """Write Urban1k with a (colour, caption) by name."""
    for name, (colour, caption) in captions.items():
        write_files(root / "Urban1k", {f"image/{name}.jpg": solid_image(colour), f"caption/{name}.txt": caption})


def write_sugarcrepe(root: Path, rows: Sequence[tuple[str, str, str]], key: str = "swap_obj") -> Path:
    """Write a set of SugarCrepe with (colour, right caption, wrong caption); ``none`` has no image -> its file."""
    named = ("filename", "caption", "negative_caption")
    content = {str(n): dict(zip(named, (f"{row[0]}.jpg", *row[1:]), strict=True)) for n, row in enumerate(rows)}
    pictures = {f"val2017/{colour}.jpg": solid_image(colour) for colour, _, _ in rows if colour in COLOURS}
    write_files(root / "sugar-crepe", {f"data/{key}.json": json.dumps(content), **pictures})
    return root / "sugar-crepe" / "data" / f"{key}.json"


def write_sharegpt4v(root: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """Write ShareGPT4V with (colour, caption) -> the file of captions."""
    name, folder = "share-captioner_coco_lcs_sam_1246k_1107.json", root / "ShareGPT4V"
    content = [
        {"image": f"sam/images/{colour}.jpg", "conversations": [{"value": "?"}, {"value": text}]}
        for colour, text in rows
    ]
    pictures = {f"sam/images/{colour}.jpg": solid_image(colour) for colour, _ in rows}
    write_files(folder, {name: json.dumps(content, indent=1), **pictures})
    return folder / name


def write_xm3600(root: Path, rows: Mapping[str, Mapping[str, Sequence[str]]]) -> Path:
    """Write XM3600 with the captions by language of each colour -> the file of captions."""
    lines = [
        {"image/key": colour, **{language: {"caption": [*texts]} for language, texts in captions.items()}}
        for colour, captions in rows.items()
    ]
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    pictures = {f"images/{colour}.jpg": solid_image(colour) for colour in rows}
    write_files(root / "crossmodal-3600", {"captions.jsonl": content, **pictures})
    return root / "crossmodal-3600" / "captions.jsonl"


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for each image that is decoded."""
    found: list[int] = []
    decode = reading.decode
    monkeypatch.setattr(reading, "decode", lambda *a, **b: (found.append(1), decode(*a, **b))[1])
    return found


def stored(image: bytes) -> dict[str, Any]:
    """An image as Hugging Face stores it in a table."""
    return {"bytes": image, "path": None}
