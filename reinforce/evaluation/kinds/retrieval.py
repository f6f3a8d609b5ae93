"""Images with captions: retrieval, where models find one by the other, and the choice of a caption (SugarCrepe).

Published sets are tables, or images in files of their own with captions beside them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.kinds.base import (
    ImageSet,
    OwnSet,
    SetFiles,
    SetKind,
    SetSource,
    image_bytes,
    read_tables,
)
from reinforce.evaluation.reading import (
    CaptionFields,
    ImageBatches,
    LabelledImage,
    input_of,
    make_loader,
    read_captions,
    read_samples,
)
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import RECALLS, Metrics, Outcome
from reinforce.source.config import Limits
from reinforce.source.samples import Refusal
from reinforce.source.urls import canonical, filesystem, read_whole
from schemas import Reason

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import EvaluatedModels

_PREFIX_BYTES = 32 * 2**20  # of ShareGPT4V's file of gigabytes, which has the set at its beginning
#: Directions, with the names that DataComp's result files have for them.
_WAYS = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}


def read_annotated(one: SuiteSet, files: SetFiles) -> Iterator[LabelledImage]:
    """Yield the images of a set; targets are their captions, of SugarCrepe the right and the wrong one.

    Raises UserError for a file that cannot be read.
    """
    load, (_, root) = make_loader(files.folder), filesystem(files.folder)
    try:
        for name, captions in _read_rows(one, files):
            if not captions or not all(isinstance(caption, str) and caption for caption in captions):
                raise UserError(f"{one.name}: {name} has no text for one of its captions.")
            yield LabelledImage(name, functools.partial(load, f"{root.rstrip('/')}/{name}"), captions)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        shown = canonical(files.shards[0])
        raise UserError(f"{one.name}: {shown} has another shape than the published file: {error!r}.") from error
    except OSError as error:
        raise UserError(f"{one.name}: a file of {canonical(files.folder)} cannot be read: {error}.") from error


def _read_rows(one: SuiteSet, files: SetFiles) -> Iterator[tuple[str, list[Any]]]:
    """The names of the images of a set and their captions."""
    first = files.shards[0]
    if one.layout == "sugarcrepe":
        for row in json.loads(_read(first)).values():
            yield f"val2017/{row['filename']}", [row["caption"], row["negative_caption"]]
    elif one.layout == "pairs":  # the first line of each file of captions, and the image of its name
        for url in files.shards:
            lines = _read(url).splitlines()
            yield f"image/{url.rpartition('/')[2].removesuffix('.txt')}.jpg", lines[:1]
    elif one.layout == "xm3600":  # the first caption of each image in the language that the key of the set ends with
        language = one.key.rpartition("/")[2]
        for line in _read(first).splitlines():
            row = json.loads(line)
            yield f"images/{row['image/key']}.jpg", row[language]["caption"][:1]
    else:  # the first rows of ShareGPT4V's file; the rest is not read
        fs, path = filesystem(first)
        text = bytes(fs.cat_file(path, start=0, end=_PREFIX_BYTES)).decode("utf-8", "ignore")
        decoder, position = json.JSONDecoder(), text.index("[") + 1
        for _ in range(one.size):
            position += len(text[position : position + 100]) - len(text[position : position + 100].lstrip(" \n\r\t,"))
            if text[position : position + 1] == "]":
                return
            row, position = decoder.raw_decode(text, position)
            yield row["image"], [row["conversations"][1]["value"].replace("\n", " ")]


def _read(url: str) -> str:
    fs, path = filesystem(url)
    return read_whole(fs, path).decode("utf-8-sig")


def _score_choice(models: EvaluatedModels, images: ImageBatches) -> Outcome:
    """The share of images whose right caption, the first of two, has the higher score.

    Equal scores, and scores that are not finite, are misses; the published evaluation counts equal scores as hits.
    """
    vectors, pairs = models.encode_all(images)
    texts = models.encode_texts([caption for pair in pairs for caption in pair]) if pairs else {}
    metrics: dict[str, Metrics] = {}
    for name, of_images in vectors.items():
        right, wrong = ((of_images.double() * texts[name][side::2].double()).sum(1).float() for side in (0, 1))
        metrics[name] = {"acc": float((right > wrong).double().mean())}
    return Outcome(metrics, len(pairs) + len(images.refused), images.refused)


CHOICE = SetKind(
    "choice", lambda one, files: ImageSet(one.name, functools.partial(read_annotated, one, files), _score_choice)
)


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


def _score(distinct: bool, models: EvaluatedModels, images: ImageBatches, shared: str = "") -> Outcome:
    """The recalls of models on images with captions.

    If ``distinct``, equal captions are one text, which matches all of their images. Else each caption is a text that
    matches its own image alone, as in the published evaluations, and the metrics have DataComp's names. ``shared`` is
    that of ``EvaluatedModels.encode_all``.
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
            if distinct:
                metrics[name] = {**recalls}
            else:
                published: Metrics = {
                    f"{new}_recall@{k}": recalls[f"{way}/r{k}"] for way, new in _WAYS.items() for k in RECALLS
                }
                metrics[name] = published | {"mean_recall@1": sum(recalls[f"{way}/r1"] for way in _WAYS) / 2}
    return Outcome(metrics, len(captions) + len(images.refused), images.refused, note=note)


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


RETRIEVAL = SetKind("retrieval", _open, section="retrieval", open_own=_open_own)


def _read_tables(one: SuiteSet, files: SetFiles) -> Iterator[LabelledImage]:
    for key, row in read_tables(one, files, ["image", "caption"]):
        captions = row["caption"]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise UserError(f"{one.name}: {key} has no list of captions in its column caption, but {captions!r:.100}.")
        yield LabelledImage(key, functools.partial(bytes, image_bytes(row["image"], key, one.name)), captions)
