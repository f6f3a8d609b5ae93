"""Evaluation of a model on the sets of a config, during training or on its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from reinforce.errors import UserError
from reinforce.evaluation.config import RETRIEVAL, ZERO_SHOT, Evaluation
from reinforce.evaluation.encoding import NOT_FINITE_FIX, Encoder, NotFinite, build_classifier, encode_texts
from reinforce.evaluation.images import CacheBudget, ImageBatches
from reinforce.evaluation.ranking import compute_accuracies, compute_recalls, rank_classes
from reinforce.evaluation.report import Result, SetSummary
from reinforce.evaluation.sets import Retrieval, ZeroShot, open_retrieval_set, open_zero_shot_set
from reinforce.evaluation.suite.models import Models
from reinforce.evaluation.suite.one_set import evaluate_set, find_set
from reinforce.processes.cores import available_cores
from teachers.device.accelerator import Accelerator
from teachers.open_clip.teacher import OpenClipEncoder
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec

_MODEL = "model"
_log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates models on the sets of a config, which are checked once, at construction.

    Those of the config that fit into ``config.memory`` stay decoded between evaluations. ``only`` are the names of the
    sets that are used, such as ``zero_shot/imagenet``; default: all. Raises UserError for a faulty set: a missing
    folder or shard, labels that do not match the classes, invalid templates.
    """

    def __init__(self, config: Evaluation, only: Collection[str] | None = None) -> None:
        self.config = config
        self._threads = config.threads or available_cores()
        reading = config.limits, config.images_from or ()

        def used(kind: str, name: str) -> bool:
            return only is None or f"{kind}/{name}" in only

        self._sets: list[ZeroShot | Retrieval] = [
            *(
                open_zero_shot_set(name, one, *reading)
                for name, one in config.zero_shot.items()
                if used(ZERO_SHOT, name)
            ),
            *(
                open_retrieval_set(name, one, *reading)
                for name, one in config.retrieval.items()
                if used(RETRIEVAL, name)
            ),
        ]
        suite, root = config.suite or "", config.data or ""
        self._suite = [(one, find_set(one, root)) for one in config.suite_sets if used(suite, one.key)]
        budget = CacheBudget(config.memory)
        self._images = {
            image_set.name: ImageBatches(image_set.examples, image_set.images, config.limits, budget)
            for image_set in self._sets
        }

    def evaluate(self, model: Encoder, accelerator: Accelerator, *, keep_going: bool = False) -> Result:
        """Evaluate a dual encoder on all sets. Images that cannot be decoded are left out and listed in the result.

        A set on which the model gives embeddings that are not finite has failed, and has no metrics. Raises UserError
        where the model has no image or text side, where no image of a set can be decoded, and for a set of the suite
        that cannot be used; with ``keep_going`` this set has failed, too.
        """
        metrics: dict[str, float] = {}
        summaries: dict[str, SetSummary] = {}
        failed: dict[str, str] = {}
        for image_set in self._sets:
            finite = NotFinite()
            if isinstance(image_set, ZeroShot):
                scores, images = self._classify(image_set, model, accelerator, finite)
            else:
                scores, images = self._retrieve(image_set, model, accelerator, finite)
            summaries[image_set.name] = SetSummary(images, self._images[image_set.name].refused)
            if fault := finite.describe(_MODEL):
                failed[image_set.name] = f"{fault}. {NOT_FINITE_FIX}"
            else:
                metrics |= {f"{image_set.name}/{name}": score for name, score in scores.items()}
        models = Models({_MODEL: model}, accelerator, self.config.batch, self._threads)
        for one, files in self._suite:
            name = f"{self.config.suite}/{one.key}"
            try:
                outcome = evaluate_set(one, files, models)
            except (UserError, OSError, ValueError, RuntimeError) as error:
                if not keep_going:
                    raise
                failed[name] = str(error)
                continue
            summaries[name] = SetSummary(outcome.samples - len(outcome.refused), outcome.refused, one.size)
            if why := outcome.failed.get(_MODEL):
                failed[name] = why
                continue
            score = outcome.metrics[_MODEL][one.main_metric]
            assert score is not None  # evaluate_set refuses it
            metrics[f"{name}/{one.main_metric}"] = score
        return Result(metrics, summaries, failed)

    def describe(self, accelerator: Accelerator) -> str:
        """A line about what an evaluation uses."""
        device, threads = accelerator.device.type, torch.get_num_threads()
        counts = ((threads, "CPU thread"), (self._threads, "decoding thread"))
        used = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts)
        return f"{used}, batches of {self.config.batch}, device {device}"

    def evaluate_module(
        self, model: torch.nn.Module, image: ImageSpec, tokenizer: Any, accelerator: Accelerator
    ) -> Result:
        """Evaluate an open_clip model that is on the accelerator, without side effects on its training run.

        ``image`` is its preprocessing (``teachers.open_clip.teacher.image_spec``), ``tokenizer`` open_clip's. Modes of
        modules, gradients and the global random state are left unchanged. A set of the suite that fails is logged.
        """
        with _eval_mode(model, accelerator):
            encoder = OpenClipEncoder(model, image, tokenizer, accelerator)
            result = self.evaluate(encoder, accelerator, keep_going=True)
        for name, why in result.failed.items():
            _log.warning("%s failed, and has no metric: %s", name, why)
        for name, summary in result.sets.items():
            if summary.refused:
                _log.warning("%s: %s", name, summary)
        return result

    def _classify(
        self, image_set: ZeroShot, model: Encoder, accelerator: Accelerator, finite: NotFinite
    ) -> tuple[dict[str, float], int]:
        """Metrics of a classification set, and the number of its images that were decoded."""
        weights = accelerator.put(build_classifier(model, image_set.classes, image_set.templates, self.config.batch))
        finite.add(_MODEL, "class", weights)
        ranks, predicted, labels = [], [], []
        for vectors, targets in self._encode_images(image_set, model, accelerator):
            finite.add(_MODEL, "image", vectors)
            labels.append(np.array(targets, np.int64))
            ranking = rank_classes(vectors, weights, accelerator.put(labels[-1]))
            ranks.append(ranking.ranks)
            predicted.append(ranking.predicted)
        arrays = torch.cat(ranks).cpu().numpy(), np.concatenate(labels), torch.cat(predicted).cpu().numpy()
        return compute_accuracies(*arrays, image_set.groups), len(arrays[0])

    def _retrieve(
        self, image_set: Retrieval, model: Encoder, accelerator: Accelerator, finite: NotFinite
    ) -> tuple[dict[str, float], int]:
        """Metrics of a retrieval set, and the number of its images that were decoded."""
        vectors, image_indices, text_indices = [], [], []
        index_of: dict[str, int] = {}
        count = 0
        for batch, targets in self._encode_images(image_set, model, accelerator):
            vectors.append(batch.cpu())
            for captions in targets:
                text_indices += [index_of.setdefault(caption, len(index_of)) for caption in captions]
                image_indices += [count] * len(captions)
                count += 1
        images, texts = torch.cat(vectors), encode_texts(model, list(index_of), self.config.batch).cpu()
        finite.add(_MODEL, "image", images)
        finite.add(_MODEL, "text", texts)
        return compute_recalls(images, texts, np.array([image_indices, text_indices], np.int64), accelerator), count

    def _encode_images(
        self, image_set: ZeroShot | Retrieval, model: Encoder, accelerator: Accelerator
    ) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        """Yield image embeddings, float32 [B, dim] on the device, and targets of each batch of a set."""
        spec = model.image
        if spec is None:
            raise UserError(f"{image_set.name}: the model has no image side; evaluate a model that encodes images.")
        empty = True
        for batch in self._images[image_set.name].batches(spec, self.config.batch, self._threads):
            empty = False
            pixels = to_pixels(accelerator.put(batch.pixels), spec)
            yield model.encode_images(pixels).float(), batch.targets
        if empty:
            refused = self._images[image_set.name].refused[0]
            raise UserError(
                f"{image_set.name}: every image is refused, the first ({refused.key}) for {refused.reason.value}: "
                f"{refused.detail}. Check that these are images, or widen `limits`."
            )


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Put a model into eval mode, and restore modes and random state at the end."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
