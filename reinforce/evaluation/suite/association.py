"""WinoGAViL: which of five to twelve candidate images a cue is associated with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from reinforce.errors import UserError
from reinforce.evaluation.reading import Example
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.suite.files import SetFiles, image_bytes, read_tables
from reinforce.evaluation.suite.metrics import association_metrics, jaccard
from reinforce.evaluation.suite.models import Models, Outcome
from reinforce.source.samples import Refusal

_COLUMNS = ["cue", "candidate_images", "candidates", "associations"]


@dataclass
class _Instance:
    key: str
    text: str
    associated: np.ndarray  # bool, by candidate
    rows: list[int] = field(default_factory=list)  # of the candidates among all images

    @property
    def content(self) -> list[object]:
        """What the metric depends on, as JSON."""
        return [self.text, self.associated.tolist()]


def associate(one: SuiteSet, files: SetFiles, models: Models) -> Outcome:
    """Evaluate models on instances of a cue and candidates. Raises UserError for a table that does not fit.

    An instance with a broken image is refused as a whole.
    """
    instances: list[_Instance] = []
    broken: list[Refusal] = []
    vectors, targets = models.encode_all(_examples(one, files, instances), broken)
    for row, instance in enumerate(targets):
        instance.rows.append(row)
    refused = list({refusal.key.partition("/")[0]: refusal for refusal in broken if refusal.key}.values())
    keys = {refusal.key.partition("/")[0] for refusal in refused if refusal.key}
    whole = [instance for instance in instances if instance.key not in keys]
    metrics: dict[str, dict[str, float | None]] = {}
    if whole:
        texts = models.encode_texts([instance.text for instance in whole])
        counts = [len(instance.associated) for instance in whole]
        for name, images in vectors.items():
            scores = [
                jaccard(_scores(images[instance.rows], text), instance.associated)
                for instance, text in zip(whole, texts[name], strict=True)
            ]
            metrics[name] = {**association_metrics(scores, counts)}
    return Outcome(metrics, len(instances), refused)


def cue_text(cue: str) -> str:
    """The text about a cue, as the published evaluation has it: ``A dog``, ``An owl``."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def _scores(images: torch.Tensor, text: torch.Tensor) -> np.ndarray:
    """Scores of candidates, rounded to float32, so that equal vectors tie."""
    return (images.double() @ text.double()).float().numpy()


def _examples(one: SuiteSet, files: SetFiles, instances: list[_Instance]) -> Iterator[Example]:
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
        instances.append(instance)
        for number, image in enumerate(images):
            load = functools.partial(bytes, image_bytes(image, key, one.name))
            yield Example(f"{key}/{number}", load, instance)
