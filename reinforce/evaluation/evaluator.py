"""Evaluation of models on one set, and of a model on the sets of a config, during training or on its own."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any, cast

import torch

from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import NOT_FINITE_FIX, Encoder, EvaluatedModels
from reinforce.evaluation.kinds.base import ImageSet, SetFiles, find_set
from reinforce.evaluation.kinds.registry import KINDS
from reinforce.evaluation.reading import CacheBudget, ContentDigest, ImageBatches
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Outcome, Result, name_refused
from reinforce.images.policy import PUBLISHED_POLICY
from reinforce.processes.cores import available_cores
from teachers.image_encoder import ImageEncoder
from teachers.open_clip.teacher import OpenClipEncoder
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator

#: Share of a published set's images that may be broken.
BROKEN = 0.001
_MODEL = "model"
_READ_AT_ONCE = 64
_log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates models on the sets of a config, which are checked once, at construction.

    Those of the user that fit into ``config.memory`` stay decoded between evaluations. ``only`` are the names of the
    sets that are used, such as ``zero_shot/imagenet``; default: all. ``shown`` is that of ``EvaluatedModels``.
    ``threads`` decode images, by default one per core. Raises UserError for a faulty set: a missing folder or shard,
    labels that do not match the classes, invalid templates.
    """

    def __init__(
        self,
        config: Evaluation,
        only: Collection[str] | None = None,
        shown: int = 0,
        threads: int | None = None,
    ) -> None:
        self.config = config
        self._shown = shown
        self._threads = threads or available_cores()
        budget = CacheBudget(config.memory)
        self._own: list[tuple[ImageSet, ImageBatches]] = []
        for name, (kind, one) in config.own_sets.items():
            if only is None or name in only:
                assert kind.open_own is not None
                own = kind.open_own(one, name, config.limits, config.images_from or ())
                images = ImageBatches(own.examples, own.count, config.limits, budget, own.policy)
                self._own.append((own, images))
        published = {f"{config.suite}/{one.key}": one for one in config.suite_sets}
        self._published = {
            name: (one, find_set(one, config.data or ""))
            for name, one in published.items()
            if only is None or name in only
        }

    @property
    def images(self) -> int:
        """The images that are encoded, without those of sets whose number is not known before they are read."""
        return sum(own.count for own, _ in self._own) + sum(one.size for one, _ in self._published.values())

    def evaluate(self, model: Encoder, accelerator: Accelerator, *, keep_going: bool = False) -> Result:
        """Evaluate a model on all sets. Images that cannot be decoded are left out and listed in the result.

        A set on which the model gives embeddings that are not finite has failed, and has no metrics. Raises UserError
        where the model lacks a side that a set needs, where no image of a set can be decoded, and for a set of the
        suite that cannot be used; with ``keep_going`` this set has failed, too.
        """
        result = Result({}, {})
        models = EvaluatedModels(
            {_MODEL: model}, accelerator, self.config.batch, self._threads, short=True, shown=self._shown
        )
        for own, images in self._own:
            outcome = evaluate_set(own, images, models)
            if not outcome.images:
                first = outcome.refused[0]
                raise UserError(
                    f"{own.name}: every image is refused, the first ({first.key}) for {first.reason.value}: "
                    f"{first.detail}. Check that these are images, or widen `limits`."
                )
            result.add(own.name, _MODEL, outcome)
        for name, (one, files) in self._published.items():
            try:
                outcome = evaluate_published(one, files, models)
            except (UserError, OSError, ValueError, RuntimeError) as error:
                if not keep_going:
                    raise
                result.failed[name] = str(error)
                continue
            of_main = {of: {one.main_metric: scores[one.main_metric]} for of, scores in outcome.metrics.items()}
            result.add(name, _MODEL, replace(outcome, metrics=of_main, published=one.size))
        return result

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

        ``image`` is its preprocessing (``teachers.open_clip.teacher.image_spec``), ``tokenizer`` open_clip's; None for
        a module that encodes images alone, by ``encode_image``. Modes of modules, gradients and the global random state
        are left unchanged. A set that fails is logged.
        """
        with _eval_mode(model, accelerator):
            if tokenizer is None:
                encode = cast(Any, model).encode_image
                encoder = cast(Encoder, ImageEncoder(model, image, accelerator, encode))
            else:
                encoder = OpenClipEncoder(model, image, tokenizer, accelerator)
            result = self.evaluate(encoder, accelerator, keep_going=True)
        for name, why in result.failed.items():
            _log.warning("%s failed, and has no metric: %s", name, why)
        for name, outcome in result.sets.items():
            if outcome.refused or outcome.note:
                _log.warning("%s: %s", name, outcome)
        return result


def evaluate_set(image_set: ImageSet, images: ImageBatches, models: EvaluatedModels) -> Outcome:
    """Evaluate models on the images of a set.

    A model with embeddings that are not finite is in ``failed`` of the outcome, and has no metrics.
    """
    models.not_finite.counts.clear()
    outcome = image_set.score(models, images)
    found = {name: models.not_finite.describe(name) for name in outcome.metrics}
    failed = outcome.failed | {name: f"{fault}. {NOT_FINITE_FIX}" for name, fault in found.items() if fault}
    metrics = {name: scores for name, scores in outcome.metrics.items() if name not in failed}
    return replace(outcome, metrics=metrics, failed=failed, content=images.digest.hexdigest() if images.digest else "")


def evaluate_published(
    one: SuiteSet,
    files: SetFiles,
    models: EvaluatedModels,
    digest: ContentDigest | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Outcome:
    """Evaluate models on a published set, whose images are decoded as by Pillow's ``convert("RGB")``.

    ``digest`` receives what is read, ``progress`` the number of images. Raises UserError where the set cannot be used,
    or where a number would look right but is not.
    """
    open_published = KINDS[one.kind].open
    assert open_published is not None
    image_set = open_published(one, files)
    images = ImageBatches(image_set.examples, policy=PUBLISHED_POLICY, digest=digest, progress=progress)
    outcome = evaluate_set(image_set, images, models)
    if len(outcome.refused) > BROKEN * outcome.samples:
        raise UserError(
            f"{one.name}: {len(outcome.refused):,} of {outcome.samples:,} images cannot be used, more than "
            f"{BROKEN:.1%}: {name_refused(outcome.refused)}. Download the set again."
        )
    for name, metrics in outcome.metrics.items():
        score = metrics.get(one.main_metric)
        if score is None or not math.isfinite(score):
            raise UserError(f"{one.name}: {name} has no {one.main_metric}, since no sample of the set counts for it.")
    if models.encoders and not outcome.metrics and not outcome.failed:
        raise UserError(f"{one.name} has no samples. Download the set again.")
    return outcome


def read_content(one: SuiteSet, files: SetFiles, threads: int) -> str:
    """The digest of a set's content, of which nothing is decoded. Raises UserError where it cannot be used."""
    none = EvaluatedModels({}, Accelerator("cpu"), _READ_AT_ONCE, threads)
    return evaluate_published(one, files, none, ContentDigest()).content


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
