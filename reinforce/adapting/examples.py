"""Held-out images that one model gets right and another does not, for people to look at."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Models
from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.kinds.labels import ZeroShotSet
from reinforce.evaluation.reading import LabelledImage
from reinforce.images.policy import decode
from reinforce.source.samples import Refusal, T

_SIMILARITIES = 2**24  # computed at once, 8 bytes each
_SIDE = 200  # pixels of the longer side of a picture


@dataclass(frozen=True)
class Answer:
    """What a model takes an image for: a class or a caption, and whether it is one of the image.

    ``number`` is that of the image in its set, ``truth`` its class or its first caption.
    """

    number: int
    key: str
    truth: str
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """An image that one of two models gets right, as both answer; ``picture`` is a small WebP of it."""

    before: Answer
    after: Answer
    picture: bytes


class HeldOut:
    """A set of an evaluation, by its name in ``own_sets``, whose images keep their numbers."""

    def __init__(self, evaluation: Evaluation, name: str) -> None:
        self._kind, self._config = evaluation.own_sets[name]
        assert self._kind.open_own is not None
        self._set = self._kind.open_own(self._config, name, evaluation.limits, evaluation.images_from or ())
        self._limits, self._name = evaluation.limits, name

    def answers(self, models: Models) -> list[Answer]:
        """What a model takes the images for; ``models`` has one model."""
        vectors, targets = models.encode_all(ImageBatches(self._numbered, self._set.count, self._limits))
        if not targets:
            return []
        [model] = models.encoders
        if isinstance(self._config, ZeroShotSet):
            texts = [*(self._config.classes or ())]
            templates = load_templates(self._config.templates, self._name)
            candidates = models.classifiers(texts, templates)[model].cpu()
            right = [{int(target)} for _, _, target in targets]
        else:
            texts = [*dict.fromkeys(text for _, _, captions in targets for text in captions)]
            place = {text: number for number, text in enumerate(texts)}
            candidates = models.encode_texts(texts)[model]
            right = [{place[text] for text in captions} for _, _, captions in targets]
        found = zip(targets, right, _best(vectors[model], candidates), strict=True)
        return [Answer(n, key, texts[min(own)], texts[one], one in own) for (n, key, _), own, one in found]

    def examples(
        self, before: Sequence[Answer], after: Sequence[Answer], most: int
    ) -> tuple[list[Example], list[Example]]:
        """Up to ``most`` images that are gained, and that are lost, from one model to another, spread over the set."""
        pairs = [*zip(before, after, strict=True)]
        gained = _spread([pair for pair in pairs if pair[1].right and not pair[0].right], most)
        lost = _spread([pair for pair in pairs if pair[0].right and not pair[1].right], most)
        pictures = self._pictures({one.number for one, _ in (*gained, *lost)})
        found = ([Example(*pair, pictures[pair[0].number]) for pair in of] for of in (gained, lost))
        return next(found), next(found)

    def _numbered(self) -> Iterator[LabelledImage | Refusal]:
        for number, item in enumerate(self._set.examples()):
            yield item if isinstance(item, Refusal) else replace(item, target=(number, item.key, item.target))

    def _pictures(self, numbers: Collection[int]) -> dict[int, bytes]:
        items = (item for item in self._numbered() if isinstance(item, LabelledImage))
        wanted = (item for item in items if item.target[0] in numbers)
        return {item.target[0]: _picture(decode(item.load(), self._limits)) for item in wanted}


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, at equal distances."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]


def _picture(image: Image.Image) -> bytes:
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return buffer.getvalue()


def _best(images: torch.Tensor, candidates: torch.Tensor) -> list[int]:
    """The most similar of the candidates [C, D] for each image [N, D], by blocks of ``_SIMILARITIES``."""
    columns = candidates.double().T
    blocks = images.split(max(1, _SIMILARITIES // len(candidates)))
    return [int(one) for block in blocks for one in (block.double() @ columns).argmax(1)]
