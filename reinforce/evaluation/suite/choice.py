"""SugarCrepe: whether a model prefers the right caption of an image to a wrong one."""

from __future__ import annotations

from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.suite.annotated import read_annotated
from reinforce.evaluation.suite.files import SetFiles
from reinforce.evaluation.suite.models import Models, Outcome
from reinforce.source.samples import Refusal


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
