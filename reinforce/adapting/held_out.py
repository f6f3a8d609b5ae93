"""What models answer for the held-out images: classes, captions of images and images of captions."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from reinforce.adapting.config import DOMAIN
from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Models
from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.kinds.labels import ZeroShotSet
from reinforce.evaluation.ranking import rank_classes, rank_matches
from reinforce.evaluation.reading import LabelledImage
from reinforce.images.policy import decode
from reinforce.markup import picture_address
from reinforce.source.samples import Refusal, T

CLASSES, CAPTIONS = f"zero_shot/{DOMAIN}", f"retrieval/{DOMAIN}"
_SIMILARITIES = 2**24  # computed at once, 8 bytes each
_SIDE = 200  # pixels of the longer side of a picture


@dataclass(frozen=True)
class Queries:
    """Queries of a model, images or captions, and which of them it answers right.

    Attributes:
        rows: number of the held-out image of each query; of a caption of several images, the first.
        right: whether each is answered right, as the metric at rank 1 counts it.
        classes: the true class of each; 0 for captions.
        found: the class that the model answers, -1 for none; empty for captions.
    """

    rows: Sequence[int]
    right: Sequence[int]
    classes: Sequence[int]
    found: Sequence[int] = ()


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
    """An image that one of two models gets right, as both answer; ``picture`` is the address of a small WebP of it."""

    before: Answer
    after: Answer
    picture: str


class HeldOut:
    """A set of an evaluation, by its name in ``own_sets``, whose images keep their numbers."""

    def __init__(self, evaluation: Evaluation, name: str) -> None:
        self._kind, self._config = evaluation.own_sets[name]
        assert self._kind.open_own is not None
        self._set = self._kind.open_own(self._config, name, evaluation.limits, evaluation.images_from or ())
        self._limits, self._name = evaluation.limits, name

    @classmethod
    def every(cls, evaluation: Evaluation) -> dict[str, HeldOut]:
        """The sets of the held-out images by name."""
        return {name: cls(evaluation, name) for name in (CLASSES, CAPTIONS) if name in evaluation.own_sets}

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

    def queries(self, models: Models) -> dict[str, Any]:
        """``Queries`` as JSON, by the name of their metrics without its last part; ``models`` has one model."""
        vectors, targets = models.encode_all(ImageBatches(self._numbered, self._set.count, self._limits))
        if not targets:
            return {}
        [model], rows = models.encoders, [number for number, _, _ in targets]
        if isinstance(self._config, ZeroShotSet):
            templates = load_templates(self._config.templates, self._name)
            candidates = models.classifiers([*(self._config.classes or ())], templates)[model].cpu()
            labels = torch.tensor([int(target) for _, _, target in targets])
            ranked = rank_classes(vectors[model], candidates, labels)
            right = (ranked.ranks == 0).int().tolist()
            return {self._name: asdict(Queries(rows, right, labels.tolist(), ranked.predicted.tolist()))}
        places: dict[str, int] = {}
        pairs = [
            (image, places.setdefault(text, len(places)))
            for image, (_, _, captions) in enumerate(targets)
            for text in captions
        ]
        texts = models.encode_texts([*places])[model]
        images, captions = np.array(pairs, np.int64).T
        order = np.argsort(captions, kind="stable")
        ranks = {
            "image_to_text": rank_matches(vectors[model], texts, (images, captions), models.accelerator),
            "text_to_image": rank_matches(texts, vectors[model], (captions[order], images[order]), models.accelerator),
        }
        first = images[order][np.unique(captions[order], return_index=True)[1]]
        owners = {"image_to_text": rows, "text_to_image": [rows[image] for image in first]}
        return {
            f"{self._name}/{way}": asdict(Queries(owners[way], (of == 0).astype(int).tolist(), [0] * len(of)))
            for way, of in ranks.items()
        }

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

    def _pictures(self, numbers: Collection[int]) -> dict[int, str]:
        items = (item for item in self._numbered() if isinstance(item, LabelledImage))
        wanted = (item for item in items if item.target[0] in numbers)
        return {item.target[0]: _picture(decode(item.load(), self._limits)) for item in wanted}


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, at equal distances."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]


def _picture(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return picture_address(buffer.getvalue())


def _best(images: torch.Tensor, candidates: torch.Tensor) -> list[int]:
    """The most similar of the candidates [C, D] for each image [N, D], by blocks of ``_SIMILARITIES``."""
    columns = candidates.double().T
    blocks = images.split(max(1, _SIMILARITIES // len(candidates)))
    return [int(one) for block in blocks for one in (block.double() @ columns).argmax(1)]
