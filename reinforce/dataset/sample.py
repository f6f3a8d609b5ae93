"""One sample of a reinforced dataset: its image as the teachers saw it, and how notebooks and reports show it."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, overload

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import ValidationError

from reinforce.dataset import vectors
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layer_file import row_errors
from reinforce.dataset.layers import (
    NO_IMAGES,
    SAMPLES,
    TRUE_CAPTION,
    captions_layer,
    embeddings_layer,
)
from reinforce.errors import UserError
from reinforce.images.backends import BACKENDS, load_backend
from reinforce.images.policy import IMAGE_POLICIES, ImageRefused, decode, is_image_policy, limits_of_reader
from reinforce.images.records import Augmentation, Crop, from_records
from reinforce.source.config import Limits
from reinforce.source.references import ImageRoots, referenced_images
from reinforce.terminal import escape
from schemas import IMAGE_DIGEST, Reason, image_column
from schemas.seeds import Ints

#: Augmentations that are shown of a sample.
SHOWN_REPLAYS = 8
_CAPTION_CHARS = 60  # of a caption in repr
_SIDE, _REPLAY_SIDE = 320, 120  # pixels of pictures in a notebook
_LOSSLESS_PIXELS = 256**2  # images up to this size are stored without loss
_QUALITY = 82


@dataclass(frozen=True)
class ImagePolicies:
    """How a dataset's images become pixels, as its dataset.json records it.

    ``image`` is the image policy, ``augmentation`` the augmentation backend, ``limits`` the bounds on an image.
    """

    url: str
    image: str
    augmentation: str
    limits: Limits

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], url: str) -> ImagePolicies:
        """Read them from a manifest, with its limits as ``limits_of_reader``.

        Raises UserError if it does not record them.
        """
        try:
            policies, limits = manifest["policies"], Limits.model_validate(manifest["input"]["limits"])
            image, augmentation = policies["image"], policies["augmentation"]
            if not isinstance(image, str) or not isinstance(augmentation, str):
                raise TypeError
            return cls(url, image, augmentation, limits_of_reader(limits))
        except (KeyError, TypeError, ValidationError) as error:
            raise UserError(f"{url}: dataset.json does not record image policies and limits. Restore it.") from error

    def check(self) -> None:
        """Raise UserError if this version of the program does not implement the recorded policies."""
        for name, recorded, is_supported, supported in (
            ("image", self.image, is_image_policy(self.image), IMAGE_POLICIES),
            ("augmentation", self.augmentation, self.augmentation in BACKENDS, " and ".join(BACKENDS)),
        ):
            if not is_supported:
                raise UserError(
                    f"{self.url} has {name} policy {recorded}, this version supports {supported}. Use the version "
                    "that wrote it."
                )


@dataclass(frozen=True, repr=False)
class Sample:
    """One image-text pair with its reinforcements.

    Attributes:
        key: name of the sample, unique within its shard.
        caption: true caption, or None.
        metadata: the sample's JSON sidecar, or the fields of it that were kept, or None.
        width, height: size in pixels of the decoded image.
        image: encoded image, as in the source; ``pil()`` decodes it. Empty in published labels.
        augmentations: K augmentation records; ``augmented(k)`` replays one.
        captions: synthetic captions by captioner, None if the layer is null for this sample.
        images: float32 [K, D] by teacher; row k is the embedding of ``augmented(k)``.
        texts: float32 [1 or N, D] by teacher, then by ``caption`` (the true captions) or captioner.
        policies: how the dataset's images become pixels.
        values: by layer, what layers have that no model of the config makes.
        true_captions: all true captions, ``caption`` the first; more than one where the dataset keeps several.

    Vectors are NaN if the layer is null for this sample.
    """

    key: str
    caption: str | None
    metadata: dict[str, Any] | None
    width: int
    height: int
    image: bytes
    augmentations: tuple[Augmentation, ...]
    captions: Mapping[str, list[str] | None]
    images: Mapping[str, np.ndarray]
    texts: Mapping[str, Mapping[str, np.ndarray]]
    policies: ImagePolicies
    values: Mapping[str, Any] = field(default_factory=dict)
    true_captions: tuple[str, ...] = ()

    def pil(self) -> Image.Image:
        """Decode the image to RGB by the dataset's recorded image policy and limits.

        Raises UserError if the image cannot be decoded or the policy is from a newer version.
        """
        self.policies.check()
        if not self.image:
            raise UserError(
                f"{self.policies.url}, key {escape(self.key)}: there is no image, because these are published labels. "
                "`labels` in a config joins them with your copy of the images."
            )
        try:
            return decode(self.image, self.policies.limits, policy=self.policies.image)
        except ImageRefused as error:
            raise self._image_error(error) from error

    def augmented(self, k: int, size: int | None = None, image: Image.Image | None = None) -> Image.Image:
        """Replay augmentation record ``k`` by the recorded backend: the RGB crop that the teachers saw.

        ``size`` is the side of the result in pixels; default: the recorded one. At another size, translations are
        scaled with it, as in student training. Each call decodes the image; to replay many records, decode it once
        with ``pil()`` and pass it as ``image``.
        Raises IndexError if there is no record ``k``, and UserError as ``pil()``.
        """
        if not -len(self.augmentations) <= k < len(self.augmentations):
            raise IndexError(
                f"record {k} is out of range: sample {self.key} has {len(self.augmentations)} augmentation records"
            )
        self.policies.check()
        replay = load_backend(self.policies.augmentation)
        try:
            return Image.fromarray(replay(image or self.pil(), self.augmentations[k], size))
        except ValueError as error:
            raise self._image_error(error) from error

    def _image_error(self, error: Exception) -> UserError:
        if isinstance(error, ImageRefused) and error.reason is Reason.IMAGE_PIXELS:
            return UserError(f"{self.policies.url}, key {escape(self.key)}: {error.detail}. It is not decoded.")
        return UserError(
            f"{self.policies.url}, key {escape(self.key)}: this is not the image that was augmented ({error}). If "
            "images are kept by reference, restore the tar that was changed. Otherwise drop the samples of its shard "
            "(`reinforce drop DATASET samples --shard NAME --yes`) and run again."
        )

    def __repr__(self) -> str:
        caption = self.caption
        if caption is not None and len(caption) > _CAPTION_CHARS:
            caption = caption[: _CAPTION_CHARS - 3] + "..."
        captions = {name: None if texts is None else len(texts) for name, texts in self.captions.items()}
        images = {teacher: vectors.shape for teacher, vectors in self.images.items()}
        texts = {t: {name: vectors.shape for name, vectors in by_text.items()} for t, by_text in self.texts.items()}
        return (
            f"Sample(key={self.key!r}, caption={caption!r}, width={self.width}, height={self.height}, "
            f"image=<{len(self.image):,} bytes>, augmentations={len(self.augmentations)}, captions={captions}, "
            f"images={images}, texts={texts})"
        )

    def _repr_html_(self) -> str:
        from reinforce.reports import picture_address, render  # other uses need no jinja

        pictures: dict[str, Any] = {"original": "", "replays": [], "problem": ""}
        try:
            drawn = draw(self, _SIDE, _REPLAY_SIDE)
            pictures["original"] = picture_address(drawn.original)
            if drawn.replays:  # single images: notebooks may remove the styles that cut the strip
                with Image.open(io.BytesIO(drawn.replays)) as strip:
                    side = strip.height
                    squares = [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
                pictures["replays"] = [picture_address(webp(square, 85)) for square in squares]
        except UserError as error:
            pictures["problem"] = str(error)
        return render("notebook/sample.html", shown=ShownSample.of(self), **pictures)


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
    def of(cls, sample: Sample) -> ShownSample:
        """The sample as it is shown, with the teachers that have vectors of images and texts."""
        replays = []
        for number, augmentation in enumerate(sample.augmentations[:SHOWN_REPLAYS]):
            crop = augmentation.crop
            share = crop.width * crop.height / max(1, sample.width * sample.height)
            operations = (
                f"{op.name} {op.magnitude:.3g}".replace("-", "\u2212") if op.magnitude else op.name
                for op in augmentation.ops or ()
            )
            replays.append(Replay(number, crop, share, tuple(operations)))
        teachers = tuple(name for name in sample.images if sample.texts.get(name))
        by_source: dict[str, list[str | None]] = {TRUE_CAPTION: [sample.caption, *sample.true_captions[1:]]}
        by_source |= {name: [None] if texts is None else [*texts] for name, texts in sample.captions.items()}
        lines = []
        for source, texts in by_source.items():
            similarities: list[list[float | None]] = []  # of each text, by teacher
            for teacher in teachers:
                encoded = sample.texts[teacher].get(source)
                if encoded is None or len(encoded) != len(texts):
                    similarities.append([None] * len(texts))
                    continue
                cosines = vectors.mean_cosines(encoded[None], sample.images[teacher][None])[0]
                similarities.append([float(value) if np.isfinite(value) else None for value in cosines])
            captioner = None if source == TRUE_CAPTION else source
            for n, text in enumerate(texts):
                lines.append(CaptionLine(captioner, text, tuple(of_teacher[n] for of_teacher in similarities)))
        records = len(sample.augmentations)
        return cls(sample.key, sample.width, sample.height, teachers, records, tuple(replays), tuple(lines))


@dataclass(frozen=True)
class Pictures:
    """Images of a sample as WebP: the original, and the replays side by side, each a square; empty without any."""

    original: bytes
    replays: bytes


def draw(sample: Sample, side: int, replay_side: int) -> Pictures:
    """Draw the original, at most ``side`` pixels wide and high, and the first replays.

    Raises UserError if the image cannot be decoded.
    """
    image = sample.pil()
    replays = [sample.augmented(k, image=image) for k, _ in enumerate(sample.augmentations[:SHOWN_REPLAYS])]
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


def webp(image: Image.Image, quality: int | None = None) -> bytes:
    """Encode a picture as WebP, a small one without loss unless it has a ``quality``."""
    out = io.BytesIO()
    lossless = quality is None and image.width * image.height <= _LOSSLESS_PIXELS
    image.save(out, "WEBP", quality=40 if lossless else quality or _QUALITY, lossless=lossless, method=2)
    return out.getvalue()


_KEPT_BYTES = 128 * 2**20


def read_samples(
    tables: Mapping[str, pa.Table],
    manifest: Mapping[str, Any],
    teachers: Sequence[str],
    captioners: Sequence[str],
    policies: ImagePolicies,
    roots: ImageRoots,
    with_images: bool = True,
) -> Iterator[Sample]:
    """The samples of one row group. Raises UserError if a row is not what a run writes."""
    column, inputs = image_column(manifest["images"]), (TRUE_CAPTION, *captioners)
    with_images &= manifest["images"] != NO_IMAGES
    if with_images and column not in tables[SAMPLES].column_names:
        raise UserError(f"{policies.url}: column {column}, which dataset.json states, is missing. Restore it.")
    with row_errors(policies.url):
        rows, every = tables[SAMPLES].to_pylist(), true_captions(tables[SAMPLES])
        values = {name: kind_of(name).decode(table) for name, table in tables.items() if name != SAMPLES}
    captions = {c: values.pop(name) for c in captioners if (name := captions_layer(c)) in values}
    vectors = {t: values.pop(name) for t in teachers if (name := embeddings_layer(t, "images")) in values}
    texts = {t: {i: values.pop(name) for i in inputs if (name := embeddings_layer(t, i)) in values} for t in teachers}
    images: Iterator[bytes]
    if not with_images:
        images = itertools.repeat(b"", len(rows))
    elif manifest["images"] == "embed":
        images = (row["image"] for row in rows)
    else:
        digests = [row[IMAGE_DIGEST] for row in rows]
        images = referenced_images([row["image_ref"] for row in rows], roots, digests=digests)
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        with row_errors(policies.url):
            # A row with fewer true captions than vectors has the same ones again.
            ends = {TRUE_CAPTION: max(1, len(every[i]))}
            sample = Sample(
                key=row["key"],
                caption=row["caption"],
                metadata=json.loads(row["metadata"]) if row["metadata"] else None,
                width=row["width"],
                height=row["height"],
                image=image,
                augmentations=tuple(from_records(row["augmentations"])),
                captions={name: of[i] for name, of in captions.items()},
                images={name: of[i] for name, of in vectors.items()},
                texts={t: {name: one[i][: ends.get(name)] for name, one in of.items()} for t, of in texts.items()},
                values={name: of[i] for name, of in values.items()},
                true_captions=tuple(every[i]),
                policies=policies,
            )
        yield sample


class KeptGroups:
    """Row groups as tables by layer: those that were used last, up to ``_KEPT_BYTES``. A copy by pickle is empty.

    One that could not be read is not kept, so it is read again.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._groups: dict[tuple[str, int], Future[dict[str, pa.Table]]] = {}  # by shard and place, the last used last

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptGroups, ()

    def get(self, key: tuple[str, int], read: Callable[[], dict[str, pa.Table]]) -> dict[str, pa.Table]:
        """Return a row group; one thread reads it while others wait. Raises what ``read`` raises."""
        with self._lock:
            known = self._groups.pop(key, None)
            group = self._groups[key] = known or Future()
        if known is None:
            try:
                group.set_result(read())
            except BaseException as error:
                with self._lock:
                    del self._groups[key]
                group.set_exception(error)  # for those that wait
                raise
            left = _KEPT_BYTES
            with self._lock:
                for other, kept in reversed([*self._groups.items()]):
                    if kept.done():
                        left -= sum(table.nbytes for table in kept.result().values())
                        if left < 0:
                            del self._groups[other]
        return group.result()


def checked_number(number: Any, total: int) -> int:
    """The number of one of ``total`` samples, from 0 on; a negative one counts from the end.

    Raises IndexError if there is none of it, and UserError if it is none.
    """
    try:
        index = operator.index(number)
    except TypeError:
        raise UserError(f"a sample has a whole number, from 0 to {total - 1:,}; got {number!r:.100}") from None
    if not -total <= index < total:
        raise IndexError(f"sample {index} is out of range: there are {total:,}")
    return index % total


class RowPlaces:
    """Row groups [groups, 3], as ``row_group_table`` gives them, of which rows are found by their number."""

    def __init__(self, groups: Ints) -> None:
        self.groups = groups
        self._ends = np.cumsum(groups[:, 2])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, number: int) -> tuple[int, int]:
        """The row group of a row, by its place in the table, and the row's place in the group.

        Raises IndexError. A negative number counts from the end.
        """
        number = checked_number(number, len(self))
        group = int(np.searchsorted(self._ends, number, side="right"))
        return group, number - int(self._ends[group] - self.groups[group, 2])


class Samples(Sequence[Sample]):
    """The samples of a dataset in their order; ``Dataset.samples``: a map-style dataset for the DataLoader of torch.

    ``samples[3]`` is a sample, ``samples[:5]`` a list of samples. A row group is read as a whole: those that were read
    last stay in memory, up to 128 MiB. A process that a DataLoader forks opens the files again.
    """

    def __init__(self, data: Any, groups: Ints) -> None:
        # `data` is the Dataset; a copy of it opens its files again.
        self._data, self._places, self._kept, self._process = data, RowPlaces(groups), KeptGroups(), os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        [sample] = self.__getitems__([index])
        return sample

    def __getitems__(self, numbers: Iterable[int]) -> list[Sample]:
        """Some samples, as a DataLoader asks for those of a batch."""
        if self._process != os.getpid():  # clients of object stores are not fork-safe
            self._data, self._kept, self._process = copy.copy(self._data), KeptGroups(), os.getpid()
            self._data.store = copy.deepcopy(self._data.store)
        samples = []
        for number in numbers:
            group, place = self._places.find(number)
            of_shard, in_file, _ = self._places.groups[group].tolist()
            shard = self._data.shards[of_shard]
            tables = self._kept.get((shard, in_file), functools.partial(self._data.row_group, shard, in_file))
            samples += self._data.samples_of(shard, tables, [place])
        return samples
