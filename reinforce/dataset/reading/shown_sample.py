"""A sample as notebooks and reports show it: crops, augmentations, and captions with similarities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from reinforce.dataset import vectors
from reinforce.dataset.augment.records import Augmentation, Crop
from reinforce.dataset.layers import TRUE_CAPTION

#: Augmentations that are shown of a sample.
SHOWN_REPLAYS = 8
_LOSSLESS_PIXELS = 256**2  # images up to this size are stored without loss
_QUALITY = 82


class Shown(Protocol):
    """The attributes of a ``Sample`` that are used."""

    @property
    def key(self) -> str: ...
    @property
    def caption(self) -> str | None: ...
    @property
    def true_captions(self) -> Sequence[str]: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def augmentations(self) -> Sequence[Augmentation]: ...
    @property
    def captions(self) -> Mapping[str, list[str] | None]: ...
    @property
    def images(self) -> Mapping[str, np.ndarray]: ...
    @property
    def texts(self) -> Mapping[str, Mapping[str, np.ndarray]]: ...
    def pil(self) -> Image.Image: ...
    def augmented(self, k: int, size: int | None = None, image: Image.Image | None = None) -> Image.Image: ...


@dataclass(frozen=True)
class Replay:
    """One augmentation record: the crop in the image, its share of the image's area, and its operations as text."""

    number: int
    crop: Crop
    share: float
    operations: tuple[str, ...]

    @property
    def text(self) -> str:
        """Alt text of the record, in one line."""
        return ", ".join([f"crop of {self.share:.0%} of the image", *self.operations])


@dataclass(frozen=True)
class CaptionLine:
    """A caption and its similarity to the image by each teacher, None where there is none.

    ``captioner`` is None for the true caption. A caption that the dataset does not have has no ``text``.
    """

    captioner: str | None
    text: str | None
    similarities: tuple[float | None, ...]


@dataclass(frozen=True)
class ShownSample:
    """One sample as it is shown. ``records`` counts its augmentation records, of which ``replays`` are the first."""

    key: str
    width: int
    height: int
    teachers: tuple[str, ...]
    records: int
    replays: tuple[Replay, ...]
    captions: tuple[CaptionLine, ...]

    @classmethod
    def of(cls, sample: Shown) -> ShownSample:
        """The sample as it is shown, with the teachers that have vectors of images and texts."""
        teachers = tuple(name for name in sample.images if sample.texts.get(name))
        return cls(
            sample.key,
            sample.width,
            sample.height,
            teachers,
            len(sample.augmentations),
            tuple(_replay(sample, k) for k in range(min(SHOWN_REPLAYS, len(sample.augmentations)))),
            tuple(_caption_lines(sample, teachers)),
        )


@dataclass(frozen=True)
class Pictures:
    """Images of a sample as WebP: the original, and the replays side by side, each a square; empty without any."""

    original: bytes
    replays: bytes


def draw(sample: Shown, side: int, replay_side: int) -> Pictures:
    """Draw the original, at most ``side`` pixels wide and high, and the first replays.

    Raises UserError if the image cannot be decoded.
    """
    image = sample.pil()
    replays = [sample.augmented(k, image=image) for k in range(min(SHOWN_REPLAYS, len(sample.augmentations)))]
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    if not replays:
        return Pictures(webp(small), b"")
    square = min(replay_side, max(replay.width for replay in replays))
    strip = Image.new("RGB", (square * len(replays), square))
    for k, replay in enumerate(replays):
        same = replay.size == (square, square)
        strip.paste(replay if same else replay.resize((square, square), Image.Resampling.LANCZOS), (k * square, 0))
    return Pictures(webp(small), webp(strip))


def webp(image: Image.Image) -> bytes:
    """Encode a picture as WebP, a small one without loss."""
    import io

    out = io.BytesIO()
    lossless = image.width * image.height <= _LOSSLESS_PIXELS
    image.save(out, "WEBP", quality=40 if lossless else _QUALITY, lossless=lossless, method=2)
    return out.getvalue()


def _replay(sample: Shown, number: int) -> Replay:
    augmentation = sample.augmentations[number]
    crop = augmentation.crop
    share = crop.width * crop.height / max(1, sample.width * sample.height)
    return Replay(number, crop, share, tuple(_operations(augmentation)))


def _operations(augmentation: Augmentation) -> Iterator[str]:
    for op in augmentation.ops or ():
        yield f"{op.name} {op.magnitude:.3g}".replace("-", "\u2212") if op.magnitude else op.name


def _caption_lines(sample: Shown, teachers: tuple[str, ...]) -> Iterator[CaptionLine]:
    by_source: dict[str, list[str | None]] = {TRUE_CAPTION: [sample.caption, *sample.true_captions[1:]]}
    by_source |= {name: [None] if texts is None else [*texts] for name, texts in sample.captions.items()}
    for source, texts in by_source.items():
        columns = [_similarities(sample, teacher, source, len(texts)) for teacher in teachers]
        for n, text in enumerate(texts):
            captioner = None if source == TRUE_CAPTION else source
            yield CaptionLine(captioner, text, tuple(column[n] for column in columns))


def _similarities(sample: Shown, teacher: str, source: str, count: int) -> list[float | None]:
    texts = sample.texts[teacher].get(source)
    if texts is None or len(texts) != count:
        return [None] * count
    cosines = vectors.mean_cosines(texts[None], sample.images[teacher][None])[0]
    return [float(value) if np.isfinite(value) else None for value in cosines]
