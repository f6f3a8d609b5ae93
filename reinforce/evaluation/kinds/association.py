"""WinoGAViL: which of five to twelve candidate images a cue is associated with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reinforce.errors import UserError
from reinforce.evaluation.kinds.base import ImageSet, SetFiles, SetKind, image_bytes, read_tables
from reinforce.evaluation.reading import ImageBatches, LabelledImage
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Metrics, Outcome

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import EvaluatedModels

_COLUMNS = ["cue", "candidate_images", "candidates", "associations"]


@dataclass(frozen=True)
class _Instance:
    """A cue and its candidates; each candidate is an example whose target is its instance."""

    key: str
    text: str
    associated: np.ndarray  # bool, by candidate

    @property
    def content(self) -> list[object]:
        """What the metric depends on, as JSON."""
        return [self.text, self.associated.tolist()]


def _score(models: EvaluatedModels, images: ImageBatches) -> Outcome:
    """The mean Jaccard indices of models. An instance with a broken image is refused as a whole."""
    vectors, targets = models.encode_all(images)
    refused = {str(refusal.key).partition("/")[0]: refusal for refusal in images.refused}
    rows: dict[str, list[int]] = {}
    for row, instance in enumerate(targets):
        rows.setdefault(instance.key, []).append(row)
    whole = {instance.key: instance for instance in targets if instance.key not in refused}
    texts = models.encode_texts([instance.text for instance in whole.values()]) if whole else {}
    counts = [len(instance.associated) for instance in whole.values()]
    metrics: dict[str, Metrics] = {}
    for name, of_texts in texts.items():
        scores = []
        for instance, text in zip(whole.values(), of_texts, strict=True):
            # rounded to float32, so that equal vectors tie
            of_candidates = (vectors[name][rows[instance.key]].double() @ text.double()).float().numpy()
            scores.append(jaccard(of_candidates, instance.associated))
        metrics[name] = association_metrics(scores, counts)
    return Outcome(metrics, len(whole) + len(refused), [*refused.values()])


def cue_text(cue: str) -> str:
    """The text about a cue, as the published evaluation has it: ``A dog``, ``An owl``."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def jaccard(scores: np.ndarray, associated: np.ndarray) -> float:
    """Jaccard index of the candidates with the highest scores, as many as are ``associated``, and those.

    ``scores`` float [N], ``associated`` bool [N], at least one. Of equal scores, the candidate that comes first counts;
    scores that are not finite are never chosen.
    """
    best = np.argsort(-scores, kind="stable")[: associated.sum()]
    chosen = np.zeros(len(scores), bool)
    chosen[best] = np.isfinite(scores[best])
    return float((chosen & associated).sum() / (chosen | associated).sum())


def association_metrics(scores: Sequence[float], candidates: Sequence[int]) -> Metrics:
    """Mean Jaccard indices of instances, over all and by the number of their candidates.

    ``scores`` are the Jaccard indices, ``candidates`` the numbers of candidates. Numbers that no instance has are left
    out. The names are those of DataComp's result files.
    """
    indices, counts = np.array(scores, float), np.array(candidates, int)
    masks = {f"jaccard_score_{count}": counts == count for count in (5, 6, 10, 12)}
    masks |= {"jaccard_score_5-6": counts <= 6, "jaccard_score_10-12": counts >= 10}
    named = {name: float(indices[mask].mean()) for name, mask in masks.items() if mask.any()}
    return {"avg_jaccard_score": float(indices.mean()), **named}


def _read(one: SuiteSet, files: SetFiles) -> Iterator[LabelledImage]:
    """Yield the candidates. Raises UserError for a table that does not fit."""
    for key, row in read_tables(one, files, _COLUMNS):
        cue, images, candidates, associations = (row[column] for column in _COLUMNS)
        lists = (images, candidates, associations)
        if not isinstance(cue, str) or not cue or not all(isinstance(value, list) and value for value in lists):
            raise UserError(f"{one.name}: {key} lacks one of {', '.join(_COLUMNS)}.")
        associated = np.isin(candidates, associations)
        if len(images) != len(candidates) or not associated.any():
            raise UserError(
                f"{one.name}: {key} has {len(images)} images for {len(candidates)} candidates, of which "
                f"{associated.sum()} are associated."
            )
        instance = _Instance(key, cue_text(cue), associated)
        for number, image in enumerate(images):
            load = functools.partial(bytes, image_bytes(image, key, one.name))
            yield LabelledImage(f"{key}/{number}", load, instance)


KIND = SetKind("association", lambda one, files: ImageSet(one.name, functools.partial(_read, one, files), _score))
