"""The choice between a right and a wrong caption of an image (SugarCrepe)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.kinds.annotated import read_annotated
from reinforce.evaluation.kinds.base import ImageSet, SetKind
from reinforce.evaluation.report import Metrics, Outcome

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import Models


def _score(models: Models, images: ImageBatches) -> Outcome:
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


KIND = SetKind("choice", lambda one, files: ImageSet(one.name, functools.partial(read_annotated, one, files), _score))
