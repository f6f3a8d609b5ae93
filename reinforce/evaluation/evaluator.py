"""Judging a model by the sets of a config, during a training or on its own."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Encoder, classifier, encode_texts
from reinforce.evaluation.pictures import Memory, Pictures
from reinforce.evaluation.ranking import accuracies, choose, recalls
from reinforce.evaluation.report import Judged, Result
from reinforce.evaluation.sets import Retrieval, ZeroShot, retrieval_set, zero_shot_set
from teachers.device import Accelerator
from teachers.open_clip import OpenClipEncoder
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec

_log = logging.getLogger(__name__)


class Evaluator:
    """The sets of a config, found whole when this is made; judges models as often as wanted.

    Sets that fit into ``config.memory`` stay decoded between evaluations. Raises UserError for what is wrong with a
    set: a missing folder or shard, labels and classes that do not fit, templates that cannot be.
    """

    def __init__(self, config: Evaluation) -> None:
        self.config = config
        self._sets: list[ZeroShot | Retrieval] = [
            *(zero_shot_set(name, part, config.limits) for name, part in config.zero_shot.items()),
            *(retrieval_set(name, part, config.limits) for name, part in config.retrieval.items()),
        ]
        memory = Memory(config.memory)
        self._pictures = {part.name: Pictures(part.examples, part.images, config.limits, memory) for part in self._sets}

    def evaluate(self, model: Encoder, accelerator: Accelerator) -> Result:
        """Judge a dual encoder by all sets. Images that cannot be had are left out, and named in the result.

        Raises UserError where the model lacks a side, or where no image of a set is left.
        """
        metrics: dict[str, float] = {}
        judged: dict[str, Judged] = {}
        for part in self._sets:
            if isinstance(part, ZeroShot):
                scores, images = self._classify(part, model, accelerator)
            else:
                scores, images = self._retrieve(part, model, accelerator)
            metrics |= {f"{part.name}/{name}": score for name, score in scores.items()}
            judged[part.name] = Judged(images, self._pictures[part.name].refused)
        return Result(metrics, judged)

    def evaluate_module(
        self, model: torch.nn.Module, image: ImageSpec, tokenizer: Any, accelerator: Accelerator
    ) -> Result:
        """Judge an open_clip model in memory, on the accelerator already, and leave it as it was.

        ``image`` is its preprocessing (``teachers.open_clip.image_spec``), ``tokenizer`` open_clip's. Modes of
        modules, gradients and the global random numbers are untouched, so a training goes on as if nothing had been.
        """
        with _untouched(model, accelerator):
            result = self.evaluate(OpenClipEncoder(model, image, tokenizer, accelerator), accelerator)
        for name, judged in result.sets.items():
            if judged.refused:
                _log.warning("%s: %s", name, judged)
        return result

    def _classify(self, part: ZeroShot, model: Encoder, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        weights = accelerator.put(classifier(model, part.classes, part.templates, self.config.batch))
        ranks, first, labels = [], [], []
        for vectors, targets in self._images(part, model, accelerator):
            labels.append(np.array(targets, np.int64))
            choices = choose(vectors, weights, accelerator.put(labels[-1]))
            ranks.append(choices.ranks)
            first.append(choices.first)
        whole = torch.cat(ranks).cpu().numpy(), np.concatenate(labels), torch.cat(first).cpu().numpy()
        return accuracies(*whole, part.groups), len(whole[0])

    def _retrieve(self, part: Retrieval, model: Encoder, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        vectors, images, texts = [], [], []
        place: dict[str, int] = {}
        count = 0
        for batch, targets in self._images(part, model, accelerator):
            vectors.append(batch.cpu())
            for captions in targets:
                texts += [place.setdefault(caption, len(place)) for caption in captions]
                images += [count] * len(captions)
                count += 1
        of_images, of_texts = torch.cat(vectors), encode_texts(model, list(place), self.config.batch)
        return recalls(of_images, of_texts, np.array([images, texts], np.int64), accelerator), count

    def _images(
        self, part: ZeroShot | Retrieval, model: Encoder, accelerator: Accelerator
    ) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        """Vectors float32 [B, dim] on the device and the targets of each batch of a set's images."""
        spec = model.image
        if spec is None:
            raise UserError(f"{part.name}: the model has no image side, so it cannot be judged by images.")
        threads = self.config.threads or _cores()
        empty = True
        for batch in self._pictures[part.name].batches(spec, self.config.batch, threads):
            empty = False
            pixels = to_pixels(accelerator.put(batch.pixels), spec)
            yield model.encode_images(pixels).float(), batch.targets
        if empty:
            refused = self._pictures[part.name].refused[0]
            raise UserError(
                f"{part.name}: every image is refused, the first ({refused.key}) for {refused.reason.value}: "
                f"{refused.detail}. Check that these are images, or widen `limits`."
            )


def _cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _untouched(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
