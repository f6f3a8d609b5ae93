"""Sets of images with captions: retrieval of one by the other, and the choice of the right caption (SugarCrepe)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from reinforce.errors import UserError
from reinforce.evaluation.ranking import compute_recalls
from reinforce.evaluation.reading import Example
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.suite.annotated import read_annotated
from reinforce.evaluation.suite.files import SetFiles, image_bytes, read_tables
from reinforce.evaluation.suite.metrics import retrieval_metrics
from reinforce.evaluation.suite.models import Models, Outcome
from reinforce.source.samples import Refusal


def retrieve(one: SuiteSet, files: SetFiles, models: Models) -> Outcome:
    """Evaluate models on a retrieval set. Raises UserError for a table that does not fit.

    Each caption is a text of its own, also where two are equal, and matches its own image alone, as in the published
    evaluations.
    """
    refused: list[Refusal] = []
    examples = _read_tables(one, files) if one.layout == "tables" else read_annotated(one, files)
    vectors, captions = models.encode_all(examples, refused)
    metrics: dict[str, dict[str, float | None]] = {}
    if captions:
        counts = [len(texts) for texts in captions]
        pairs = np.stack([np.repeat(np.arange(len(counts)), counts), np.arange(sum(counts))]).astype(np.int64)
        texts = models.encode_texts([text for of_image in captions for text in of_image])
        for name, images in vectors.items():
            recalls = compute_recalls(images, texts[name], pairs, models.accelerator)
            metrics[name] = {**retrieval_metrics(recalls)}
    return Outcome(metrics, len(captions) + len(refused), refused)


def choose(one: SuiteSet, files: SetFiles, models: Models) -> Outcome:
    """Evaluate models on images with a right and a wrong caption. Raises UserError for files that do not fit.

    Equal scores, and scores that are not finite, are misses; the published evaluation counts equal scores as hits.
    """
    refused: list[Refusal] = []
    vectors, pairs = models.encode_all(read_annotated(one, files), refused)
    metrics: dict[str, dict[str, float | None]] = {}
    if pairs:
        texts = models.encode_texts([caption for pair in pairs for caption in pair])
        for name, images in vectors.items():
            right, wrong = ((images.double() * texts[name][side::2].double()).sum(1).float() for side in (0, 1))
            metrics[name] = {"acc": float((right > wrong).double().mean())}
    return Outcome(metrics, len(pairs) + len(refused), refused)


def _read_tables(one: SuiteSet, files: SetFiles) -> Iterator[Example]:
    for key, row in read_tables(one, files, ["image", "caption"]):
        captions = row["caption"]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise UserError(f"{one.name}: {key} has no list of captions in its column caption, but {captions!r:.100}.")
        yield Example(key, functools.partial(bytes, image_bytes(row["image"], key, one.name)), captions)
