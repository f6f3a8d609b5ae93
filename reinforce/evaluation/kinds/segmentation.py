"""Semantic segmentation: a linear head learns the class of each pixel from frozen patch features, without texts.

A page shows images, their true classes, and those that each model finds.
"""

from __future__ import annotations

import colorsys
import functools
import io
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.kinds.base import ImageSet, OwnSet, SetFiles, SetKind
from reinforce.evaluation.kinds.masks import (
    IGNORED,
    LAYOUTS,
    LayoutName,
    Pair,
    covering,
    list_pairs,
    random_crop,
    read_mask,
    recognise,
    squashed,
)
from reinforce.evaluation.reading import ImageBatches, LabelledImage
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Metrics, Outcome, Report, Segmented
from reinforce.images.policy import PUBLISHED_POLICY, ImageRefused
from reinforce.processes.attempts import prefetch
from reinforce.reports import TEMPLATES, picture_address, render
from reinforce.source.config import Limits
from reinforce.source.samples import Refusal
from reinforce.storage import write_file
from reinforce.terminal import Screen, show_progress
from schemas.seeds import permutation, uniforms

if TYPE_CHECKING:
    import torch

    from reinforce.evaluation.encoding import Encoder, EvaluatedModels
    from reinforce.evaluation.kinds.segmentation_head import Segmenter
    from teachers.image_encoder import PatchEncoder
    from teachers.runtime.accelerator import Accelerator

#: Images of each set.
SHOWN = 12
_SIDE = 320  # pixels of the longer side of a picture
_OPACITY = 0.7
_GOLDEN = 0.618034  # of the circle of hues: neighbours in the list of classes differ
_HUES = [colorsys.hsv_to_rgb(index * _GOLDEN % 1, 0.55 + 0.45 * (index % 3) / 2, 1.0) for index in range(255)]
#: A colour for each class index, float32 [256, 3]; the first is black, as the background of many sets.
_COLOURS = 255 * np.array([(0, 0, 0), *_HUES], np.float32)
_CHECKED = 16  # masks of each part that are read when a set is opened
_RATIOS = 0.5, 2.0
#: Steps and warm-up by schedule: DINOv3's on ADE20K, which DINOv2 has on VOC, and a short one.
_STEPS = {"published": (40_000, 1500), "short": (1000, 40)}
_PUBLISHED_CROP = 512
#: As published: they have no key, so that scores of two students are of one head.
_DROPOUT = 0.1
_SEED = 0  # of crops, their order, and the head
_WEIGHT_DECAY: Mapping[LayoutName, float] = {"voc2012": 1e-4, "ade20k": 1e-3}
_DECAY: Mapping[LayoutName, Literal["cosine", "linear"]] = {"voc2012": "linear", "ade20k": "cosine"}


def draw(key: str, image: Image.Image, true: np.ndarray, found: np.ndarray, right: float) -> Segmented:
    """The pictures of an image; ``true`` and ``found`` [H, W] are its class indices."""
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    pixels = np.asarray(image)
    return Segmented(key, _encode(pixels), _encode(_coloured(image, true)), _encode(_coloured(image, found)), right)


def write_page(report: Report, url: str) -> None:
    """Write one HTML file with the pictures in it."""
    sets = []
    for name in dict.fromkeys(name for result in report.results.values() for name in result.sets):
        columns = {}
        for model, result in report.results.items():
            for of_model in result.sets[name].segmented.values():
                columns[model] = (result.metrics.get(f"{name}/miou"), {one.key: one for one in of_model})
        if columns:
            keys = dict.fromkeys(key for _, found in columns.values() for key in found)
            rows = [(key, [found.get(key) for _, found in columns.values()]) for key in keys]
            sets.append((name, [(model, score) for model, (score, _) in columns.items()], rows))
    style = (TEMPLATES / "report" / "report.css").read_text(encoding="utf-8")
    page = render("segmentation.html", style=style, sets=sets, address=picture_address)
    write_file(page.encode(), url)


def _coloured(image: Image.Image, labels: np.ndarray) -> np.ndarray:
    """The image under the colours of its classes; ignored pixels stay."""
    small = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image, np.float32)
    mixed = pixels + _OPACITY * (_COLOURS[small] - pixels)
    return np.where((small == IGNORED)[:, :, None], pixels, mixed).astype(np.uint8)


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


class SegmentationSet(OwnSet):
    """A set of images with masks, in the layout of Pascal VOC 2012 or ADE20K. Needs no texts.

    A head of dropout, batch normalisation and a 1 x 1 convolution learns from the training part by AdamW, on random
    crops, and the metrics are those of the test part.
    """

    images: str = Field(description="folder of the set, VOCdevkit/VOC2012 or ADEChallengeData2016, by any fsspec URI")
    classes: int | None = Field(
        None, ge=2, le=254, description="number of classes; default: 21 of voc2012 and 150 of ade20k"
    )
    train: str | None = Field(
        None, description="part that the head learns from, such as trainaug; default: train, or training of ade20k"
    )
    test: str | None = Field(None, description="part that it is measured on; default: val, or validation of ade20k")
    limit: int | None = Field(None, ge=1, description="images of each part to use, the first ones")
    stage: int = Field(-1, description="stage or block of the tower whose output is used, from the end if negative")
    schedule: Literal["short", "published"] = Field(
        "short",
        description="published: 40,000 steps, and windows of 512 pixels every 341, whose logits are averaged; short: "
        "1,000 steps on images of the model's own size, seen as a whole",
    )
    steps: int | None = Field(None, ge=1, description="steps of the head's training; default: by `schedule`")
    batch: int = Field(16, ge=2, description="crops in a step")
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate; it decays to zero")

    @property
    def scores(self) -> list[str]:
        return ["miou", "accuracy"]

    @property
    def size(self) -> int | None:
        return None if self.limit is None else 2 * self.limit

    def windows(self, encoder: Encoder) -> tuple[tuple[int, int], int | None]:
        """The (height, width) of crops and windows for a model, and the stride of windows; None: whole images."""
        assert encoder.image is not None
        if self.schedule == "short":
            return (encoder.image.height, encoder.image.width), None
        return (_PUBLISHED_CROP, _PUBLISHED_CROP), _PUBLISHED_CROP * 2 // 3


@dataclass(frozen=True)
class _Masks:
    """A set that is listed. ``table`` has the class of each value of a mask."""

    config: SegmentationSet
    name: str
    layout: LayoutName
    table: np.ndarray
    classes: int
    train: list[Pair]
    test: list[Pair]

    def examples(self) -> Iterator[LabelledImage | Refusal]:
        for pair in (*self.train, *self.test):
            yield LabelledImage(f"{'train' if pair.training else 'test'}/{pair.key}", pair.load_image, pair)

    def mask(self, pair: Pair, size: Sequence[int]) -> np.ndarray:
        return read_mask(pair, self.table, size, self.name)


def _list(config: SegmentationSet, name: str) -> _Masks:
    """List a set and check its first masks. Raises UserError."""
    layout = recognise(config.images, name)
    of_layout = LAYOUTS[layout]
    parts = [
        list_pairs(config.images, of_layout, part, training, name, config.limit)
        for part, training in ((config.train or of_layout.train, True), (config.test or of_layout.test, False))
    ]
    classes = config.classes or of_layout.classes
    found = _Masks(config, name, layout, of_layout.table(classes), classes, *parts)
    for pair in (*found.train[:_CHECKED], *found.test[:_CHECKED]):  # finds a wrong layout or number of classes early
        try:
            size = Image.open(io.BytesIO(pair.load_image())).size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # refused when it is decoded
        found.mask(pair, size)
    return found


def _open_own(config: SegmentationSet, name: str, limits: Limits, images_from: Sequence[str] = ()) -> ImageSet:
    """A set of the user, which is listed. Raises UserError."""
    found = _list(config, name)
    score = functools.partial(_score, found)
    count = len(found.train) + len(found.test)
    return ImageSet(name, found.examples, score, count, PUBLISHED_POLICY)  # masks follow no EXIF orientation


def _open(one: SuiteSet, files: SetFiles) -> ImageSet:
    """A published set. Raises UserError."""
    found = _list(SegmentationSet(images=files.folder, schedule="published"), one.name)

    def score(models: EvaluatedModels, images: ImageBatches) -> Outcome:
        schedule: Literal["short", "published"] = "short" if models.short else "published"
        config = found.config.model_copy(update={"schedule": schedule})
        return _score(replace(found, config=config), models, images)

    return ImageSet(one.name, found.examples, score, len(found.train) + len(found.test))


KIND = SetKind("segmentation", _open, section="segmentation", open_own=_open_own)


def _score(masks: _Masks, models: EvaluatedModels, images: ImageBatches) -> Outcome:
    """The metrics of heads that are trained for each model. What cannot be used has failed, with the reason."""
    segmenters: dict[str, Segmenter] = {}
    failed: dict[str, str] = {}
    refused: dict[str, Refusal] = {}
    metrics: dict[str, Metrics] = {}
    segmented: Mapping[str, Sequence[Segmented]] = {}
    try:
        for name in models.encoders:
            try:
                segmenters[name] = _train(masks, name, models, images, refused)
            except ValueError as error:  # of a model without patches, or without those of this size
                failed[name] = str(error)
        metrics, segmented = _measure(masks, segmenters, models, images)
    except UserError as error:  # of masks: the set is of no use to any model
        if not models.encoders:
            raise
        failed = dict.fromkeys(models.encoders, str(error))
    all_refused = [*refused.values(), *images.refused]
    samples = len(masks.train) + len(masks.test)
    return Outcome(metrics, samples, all_refused, masks.classes, failed, segmented=segmented)


def _train(
    masks: _Masks, name: str, models: EvaluatedModels, images: ImageBatches, refused: dict[str, Refusal]
) -> Segmenter:
    from reinforce.evaluation.kinds.segmentation_head import HeadSchedule, Segmenter, train_head
    from teachers.image_encoder import patches_of

    config, accelerator, encoder = masks.config, models.accelerator, models.encoders[name]
    if encoder.image is None:
        raise ValueError("it has no image side; evaluate a model that encodes images")
    size, stride = config.windows(encoder)
    patches = patches_of(encoder, accelerator.device, config.stage, size)
    steps, warmup = _STEPS[config.schedule]
    steps = config.steps or steps
    schedule = HeadSchedule(
        steps=steps,
        batch=config.batch,
        warmup=min(steps // 2, warmup),
        learning_rate=config.learning_rate,
        weight_decay=_WEIGHT_DECAY[masks.layout],
        decay=_DECAY[masks.layout],
        dropout=_DROPOUT,
    )

    def batches() -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        with closing(_crops(masks, images, patches, models.threads, refused)) as crops:
            loaded: Iterator[tuple[torch.Tensor, torch.Tensor]] = (
                _batch([*itertools.islice(crops, schedule.batch)], accelerator) for _ in range(schedule.steps)
            )
            if Screen.current is not None:
                loaded = show_progress(loaded, schedule.steps, "step", f"{masks.name}, head for {name}: ")
            yield from loaded

    with closing(batches()) as shown:  # an error ends the threads and the screen
        head = train_head(patches, shown, masks.classes, schedule, accelerator.device, _SEED)
    return Segmenter(patches, head, stride, models.batch)


def _batch(
    crops: Sequence[tuple[np.ndarray, np.ndarray]], accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = zip(*crops, strict=True)
    return accelerator.put(np.stack(pixels)), accelerator.put(np.stack(labels))


def _crops(
    masks: _Masks, images: ImageBatches, patches: PatchEncoder, threads: int, refused: dict[str, Refusal]
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Random crops of the training part without an end, and their class indices; images that are ``refused`` give none.

    Raises UserError if all are.
    """
    spec, config = patches.image, masks.config
    fill = np.clip(np.round(255 * np.array(spec.mean)), 0, 255).astype(np.uint8)

    def positions() -> Iterator[tuple[int, Pair]]:
        for epoch in itertools.count():
            order = permutation(len(masks.train), _SEED, "segmentation order", epoch)
            yield from ((epoch * len(order) + place, masks.train[index]) for place, index in enumerate(order))

    def crop(found: tuple[int, Pair]) -> tuple[np.ndarray, np.ndarray] | Refusal:
        position, pair = found
        try:
            image = images.open(pair.load_image())
        except ImageRefused as error:
            return Refusal(f"train/{pair.key}", error.reason, error.detail)
        [numbers] = uniforms(_SEED, [str(position)], "segmentation crop", 0, 4)
        size = spec.height, spec.width
        return random_crop(image, masks.mask(pair, image.size), size, _RATIOS, numbers, fill)

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="crop") as pool,
        closing(prefetch(pool, crop, positions(), 2 * config.batch + threads)) as items,
    ):
        for item in items:
            if not isinstance(item, Refusal):
                yield item
                continue
            refused[str(item.key)] = item
            if len(refused) == len(masks.train):
                raise UserError(
                    f"{masks.name}: every image of the training part is refused, the last ({item.key}) for "
                    f"{item.reason.value}: {item.detail}. Check that these are images."
                )


def _measure(
    masks: _Masks, segmenters: Mapping[str, Segmenter], models: EvaluatedModels, images: ImageBatches
) -> tuple[dict[str, Metrics], dict[str, list[Segmented]]]:
    """Measure all models on the test part -> metrics and pictures by model."""
    import torch

    from reinforce.evaluation.kinds.segmentation_head import confusion, mean_iou, most_likely

    views = {(one.size, one.stride is None) for one in segmenters.values()}

    def load(image: Image.Image, pair: Pair) -> tuple[dict[Any, np.ndarray], np.ndarray, str, Image.Image]:
        pixels = {view: (squashed if view[1] else covering)(image, view[0]) for view in views}
        return pixels, masks.mask(pair, image.size), pair.key, image

    put, device = models.accelerator.put, models.accelerator.device
    shape = masks.classes, masks.classes
    counts = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in segmenters}
    tested = images.whole(load, 2 * models.threads, models.threads, lambda pair: bool(segmenters) and not pair.training)
    segmented: dict[str, list[Segmented]] = {name: [] for name in segmenters}
    for pixels, labels, key, image in tested:
        for name, one in segmenters.items():
            logits, features = one.logits(put(pixels[one.size, one.stride is None]))
            models.not_finite.add(name, "patch", features)
            found = most_likely(logits, labels.shape)
            of_image = confusion(found, put(labels), masks.classes)
            counts[name] += of_image
            if len(segmented[name]) < models.shown:
                right = float(of_image.diagonal().sum() / of_image.sum().clamp(min=1))
                segmented[name].append(draw(key, image, labels, found.cpu().numpy(), right))
    if segmenters and not all(int(found.sum()) for found in counts.values()):
        raise UserError(f"{masks.name}: no pixel of the test part has a class: every image or pixel is left out.")
    scores = masks.config.scores
    return {name: dict(zip(scores, mean_iou(found), strict=True)) for name, found in counts.items()}, segmented
