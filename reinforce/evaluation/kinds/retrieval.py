"""Retrieval: images with captions, where models find one by the other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.fields import CaptionFields, read_captions
from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.kinds.annotated import read_annotated
from reinforce.evaluation.kinds.base import ImageSet, OwnSet, SetKind, SetSource
from reinforce.evaluation.kinds.files import SetFiles, image_bytes, read_tables
from reinforce.evaluation.reading import LabelledImage, input_of, read_samples
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import RECALLS, Metrics, Outcome
from reinforce.input_config import Limits
from reinforce.source.samples import Refusal
from schemas import Reason

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import Models

#: Directions, with the names that DataComp's result files have for them.
_WAYS = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}


class RetrievalSet(SetSource, OwnSet):
    """A retrieval set: images with captions. Any true match counts as a hit.

    All captions of an image match it. Equal captions are one text, which matches all of their images.
    """

    pairs: str | list[str] = Field(
        min_length=1,
        description="what `source` of a run may be: tars, Parquet, jsonl or csv files, a folder of images, or a "
        "reinforced dataset",
    )
    captions: CaptionFields = Field(["txt", "json:caption"])

    @property
    def scores(self) -> list[str]:
        return [f"{way}/r{k}" for way in _WAYS for k in RECALLS]


def _score(distinct: bool, models: Models, images: ImageBatches, shared: str = "") -> Outcome:
    """The recalls of models on images with captions.

    If ``distinct``, equal captions are one text, which matches all of their images. Else each caption is a text that
    matches its own image alone, as in the published evaluations, and the metrics have DataComp's names. ``shared`` is
    that of ``Models.encode_all``.
    """
    from reinforce.evaluation.ranking import compute_recalls

    vectors, captions = models.encode_all(images, shared)
    metrics: dict[str, Metrics] = {}
    note = ""
    if captions:
        texts = [text for of_image in captions for text in of_image]
        owners = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = [row_of[text] for text in texts] if distinct else range(len(texts))
        if distinct and len(row_of) < len(texts):
            note = f"{len(row_of):,} distinct texts of {len(texts):,} captions, each counted once"
        of_texts = models.encode_texts([*row_of] if distinct else texts)
        pairs = np.stack([owners, np.array(rows)]).astype(np.int64)
        for name, of_images in vectors.items():
            recalls = compute_recalls(of_images, of_texts[name], pairs, models.accelerator)
            metrics[name] = {**recalls} if distinct else _as_published(recalls)
    return Outcome(metrics, len(captions) + len(images.refused), images.refused, note=note)


def _as_published(recalls: dict[str, float]) -> Metrics:
    """Rename recalls, and add the mean of both directions at rank 1."""
    named: Metrics = {f"{new}_recall@{k}": recalls[f"{way}/r{k}"] for way, new in _WAYS.items() for k in RECALLS}
    return named | {"mean_recall@1": sum(recalls[f"{way}/r1"] for way in _WAYS) / 2}


def _open_own(config: RetrievalSet, name: str, limits: Limits, images_from: Sequence[str] = ()) -> ImageSet:
    """A set of the user, which is checked. Raises UserError."""
    spec = input_of(limits, images_from, config.captions, config)

    def examples() -> Iterator[LabelledImage | Refusal]:
        for item in itertools.islice(read_samples(config.pairs, spec, name), config.limit):
            if isinstance(item, Refusal):
                yield item
            elif captions := read_captions(item.all_sidecars, config.captions, limits):
                yield LabelledImage(item.key, functools.partial(bytes, item.image), captions)
            else:
                yield Refusal(item.key, Reason.NO_TEXT, f"no caption at {', '.join(config.captions)}")

    usable = [isinstance(item, LabelledImage) for item in examples()]
    if not any(usable):
        raise UserError(
            f"{name}: none of {len(usable)} images in {config.pairs} has a caption at {', '.join(config.captions)}: "
            "set `captions` to where they are."
        )
    return ImageSet(name, examples, functools.partial(_score, True), len(usable))


def _open(one: SuiteSet, files: SetFiles) -> ImageSet:
    """A published set. Reading raises UserError for a table that does not fit."""
    read = _read_tables if one.layout == "tables" else read_annotated
    # of a state that is not known, files may change between two sets
    shared = f"{files.folder} {files.state}" if one.layout == "xm3600" and files.state else ""
    return ImageSet(one.name, functools.partial(read, one, files), functools.partial(_score, False, shared=shared))


KIND = SetKind("retrieval", _open, section="retrieval", open_own=_open_own)


def _read_tables(one: SuiteSet, files: SetFiles) -> Iterator[LabelledImage]:
    for key, row in read_tables(one, files, ["image", "caption"]):
        captions = row["caption"]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise UserError(f"{one.name}: {key} has no list of captions in its column caption, but {captions!r:.100}.")
        yield LabelledImage(key, functools.partial(bytes, image_bytes(row["image"], key, one.name)), captions)
