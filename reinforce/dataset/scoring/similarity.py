"""Similarity of images and texts by teachers: the score by which data filtering networks choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from reinforce.config import Score
from reinforce.dataset.layers import TRUE_CAPTION, embeddings_layer
from reinforce.dataset.scoring.base import Floats, Scorer, StoredRows
from reinforce.dataset.vectors import own_slots
from schemas import TRUE_CAPTIONS

_VERSION = 1
_EACH_CAPTION_ONCE = 2  # the version of layers over several true captions


class Similarity(Scorer):
    """Cosines of a row's augmented images and its texts.

    For each kind of texts, such as ``caption``: ``caption_mean`` and ``caption_max`` over augmentations and texts,
    both averaged over the teachers, and with several teachers ``caption_spread``, the standard deviation of their
    means. Of several true captions, each counts once.
    """

    key = "similarity"
    earlier: ClassVar = {_VERSION: "its means over captions count those of a sample with few of them several times"}

    def __init__(self, spec: Score, version: int | None = None) -> None:
        self._teachers, self._texts = spec.similarity or [], spec.texts
        self._version = version or _VERSION
        self.columns = (TRUE_CAPTIONS,) if self._version == _EACH_CAPTION_ONCE else ()
        statistics = ("mean", "max", "spread")[: 3 if len(self._teachers) > 1 else 2]
        self.names = tuple(f"{texts}_{statistic}" for texts in self._texts for statistic in statistics)
        self.needs = tuple(embeddings_layer(t, inputs) for t in self._teachers for inputs in ("images", *self._texts))

    @classmethod
    def version_for(cls, spec: Score, captions: int) -> int:
        return _EACH_CAPTION_ONCE if captions > 1 and TRUE_CAPTION in spec.texts else _VERSION

    def identity(self) -> dict[str, Any]:
        return {"similarity": self._teachers, "texts": self._texts, "version": self._version}

    def scores(self, rows: StoredRows) -> Mapping[str, Floats]:
        found: dict[str, Floats] = {}
        for texts in self._texts:
            cosines = [self._cosines(rows, teacher, texts) for teacher in self._teachers]
            means = np.stack([self._means(rows, texts, of) for of in cosines])
            found[f"{texts}_mean"] = means.mean(axis=0)
            found[f"{texts}_max"] = np.stack([of.max(axis=(1, 2)) for of in cosines]).mean(axis=0)
            if len(cosines) > 1:
                found[f"{texts}_spread"] = means.std(axis=0)
        return found

    def _means(self, rows: StoredRows, texts: str, cosines: Floats) -> Floats:
        """The mean [rows] of cosines [rows, K, N]."""
        if self._version != _EACH_CAPTION_ONCE or texts != TRUE_CAPTION:
            found: Floats = cosines.mean(axis=(1, 2))
            return found
        own = own_slots(rows.samples(), cosines.shape[2])[:, None]
        return cosines.mean(axis=(1, 2), where=np.broadcast_to(own, cosines.shape))

    @staticmethod
    def _cosines(rows: StoredRows, teacher: str, texts: str) -> Floats:
        """Cosines [rows, K, N] of vectors with unit norm."""
        images, vectors = (rows.values(embeddings_layer(teacher, inputs)) for inputs in ("images", texts))
        return np.matmul(images, vectors.transpose(0, 2, 1))
