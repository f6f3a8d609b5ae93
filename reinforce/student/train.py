"""Training a student: its job, its feed and its task for the training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reinforce import settings
from reinforce.dataset.kinds.registry import target_sections
from reinforce.dataset.layers import TargetEncoder
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.evaluation.evaluator import Evaluator
from reinforce.images.device import augment
from reinforce.processes.cores import available_cores
from reinforce.storage import Storage
from reinforce.student import online
from reinforce.student.config import READING, StudentConfig
from reinforce.student.data.feed import StudentFeed
from reinforce.student.layers import batch_norms
from reinforce.student.model import StudentModel, build_student, export, load_tokenizer
from reinforce.student.online import online_moments, patch_moments, stored_moments
from reinforce.student.teachers import (
    CAPTION,
    IMAGE,
    SYNTHETIC,
    TeacherInfo,
    compare_towers,
    stored_models,
    stored_teachers,
    text_kinds,
)
from reinforce.student.terms.balance import Moments
from reinforce.student.terms.base import Rows, TargetModels
from reinforce.student.terms.registry import Terms, make_terms
from reinforce.student.towers import Tower, has_weights
from reinforce.terminal import plural
from reinforce.training import gather
from reinforce.training.config import Job, make_job
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.log import check_trackers
from reinforce.training.ranks import share_from_first
from reinforce.training.results import Results
from reinforce.training.step import slice_batch
from reinforce.training.task import Batch, Encoded, Metrics, Task
from teachers.open_clip.text import Tokenizer
from teachers.protocols import Teacher
from teachers.runtime.accelerator import Accelerator
from teachers.spec import ModelSpec

#: Rows of a rank's batch from which the shares of teachers are measured.
_ROWS_OF_SHARES = 1024


def train(config: StudentConfig | str | Path | dict[str, Any], *, address: str | None = None) -> Results:
    """Train a student to its end, from the last checkpoint in ``output`` if there is one.

    ``config`` is a StudentConfig, the path of a YAML file, or a dict of its content. Runs in this process, under
    torchrun as one of its ranks, or, with ``train.compute.ranks`` above 1 or an ``address`` (or RAY_ADDRESS), on Ray
    Train. Raises UserError for errors that the user can fix, and ``reinforce.processes.signals.Stopped`` after a
    signal, when a checkpoint has been written.
    """
    config = settings.as_config(StudentConfig, config)
    Storage(config.output).check_writable()
    job = student_job(config)
    check_trackers(config.log)
    if runs_on_ray(job, address) and not config.loss.online:
        build(config, Accelerator("cpu"))  # reports errors of the config before Ray starts
    return launch(partial(build, config), job, address)


def student_job(config: StudentConfig) -> Job:
    """The training loop's job for a student config."""
    return make_job(
        config,
        [config.student.model or "", *([config.student.text.model] if config.student.text else [])],
        READING,
        evaluate_start=_evaluates_start(config),
        best_of_part=config.evaluate.best is not None,
    )


def _evaluates_start(config: StudentConfig) -> bool:
    """Whether there are sets to evaluate a pretrained student on before its first step.

    Not if the best step is exported and must have been trained with rounded values.
    """
    spec, sets = config.student, config.evaluate
    if not (sets.own_sets or sets.suite) or (spec.quantize and sets.export == "best"):
        return False
    try:
        if spec.images_alone:
            return spec.backbone.from_weights
        return has_weights(ModelSpec(model=spec.model, pretrained=spec.pretrained))
    except (ValueError, OSError):
        return False  # reported where the model is built


def build(config: StudentConfig, accelerator: Accelerator) -> tuple[StudentTask, StudentFeed]:
    """Make the task and the feed of one rank. Raises UserError if config, datasets and models do not fit together."""
    task = StudentTask(config, str(accelerator.device))
    read, online = task.terms.models, target_sections("teachers") if config.loss.online else ()
    feed = StudentFeed(
        config.data,
        config.seed,
        task.model.image.height,
        Tokenizer(task.model.text_name),
        models=read | dict.fromkeys(online, ()),
        online=[*dict.fromkeys(name for section in online for name in read.get(section, ()))],
        pin=accelerator.device.type == "cuda",
    )
    feed.data |= task.terms.merged(lambda term: term.recorded)
    if config.train.batch > feed.rows:
        task.notes.append(
            f"train.batch ({config.train.batch:,}) is larger than the data ({feed.rows:,} samples), so that a batch "
            "contrasts samples with copies of themselves. Lower it."
        )
    return task, feed


class StudentTask(Task):
    """Trains the student of a config by distillation; see ``reinforce.training.task.Task``.

    Reads dataset.json of the datasets and the evaluation sets, loads the student on the CPU and, with
    ``loss.teachers``, these on ``device``. ``notes`` describe the student, the use of each teacher and the
    logit scales. Raises UserError if the config, the datasets and the models do not fit together.
    """

    model: StudentModel
    notes: list[str]
    compiles_once = True

    def __init__(self, config: StudentConfig, device: str = "cpu") -> None:
        loss, texts, images = config.loss, config.data.captions != "none", config.data.images != "none"
        teachers: dict[str, Teacher] = {}
        known: dict[str, TeacherInfo] = {}
        if loss.online:
            every = loss.lambda_ > 0 or any(term.teachers is None for term in loss.teacher_terms)
            named = [*loss.anchors, *(name for term in loss.teacher_terms for name in term.teachers or ())]
            specs = {name: spec for name, spec in loss.teachers.items() if every or name in named}
            teachers = online.load_teachers(specs, device)
            known = {name: online.teacher_info(one, loss.teachers[name], texts) for name, one in teachers.items()}
        manifests = {source.url: read_manifest(Store(source.url)) for source in config.data.datasets}
        models, others = read_stored(config, manifests), dict[tuple[str, str], TargetEncoder]()
        if loss.online:
            stored = models.entries

            def entries(section: str, names: Sequence[str] | None) -> Mapping[str, Any]:
                if section not in target_sections("teachers"):
                    return stored(section, names)
                found = online.other_targets(section, teachers, names, device)
                others.update({(section, name): target for name, target in found.items()})
                return {name: target.entry for name, target in found.items()}

            def moments(section: str, name: str, covariance: bool) -> Mapping[str, Moments]:
                data, seed = config.data, config.seed
                if section == "teachers":
                    return online_moments(data, seed, name, teachers[name], device, covariance)
                return patch_moments(
                    data, seed, name, others[section, name], loss.teachers[name], manifests, device, covariance
                )

            models = replace(models, teachers=known, entries=entries, moments=moments)
        find = models.moments
        models = replace(models, moments=lambda *of: share_from_first(lambda: find(*of)))
        self.terms: Terms = make_terms(loss, models)
        notes = compare_towers(config, manifests)
        only: Tower | None = None if texts and images else "text" if texts else "image"
        self.model = build_student(
            config.student,
            seed=config.seed,
            form=loss.form,
            terms=self.terms,
            only=only,
            checkpointing=config.train.compute.gradient_checkpointing,
        )
        self.tokenizer = load_tokenizer(self.model)
        used = self.terms.models
        self._online_teachers = {name: teachers[name] for name in used["teachers"] if name in teachers}
        self._online_others = [(name, of) for (section, name), of in others.items() if name in used.get(section, ())]
        self._config, self._precision = config, config.train.compute.precision
        rank, ranks, evaluation = gather.rank(), gather.world_size(), config.evaluate
        if rank == 0 and ranks > 1:
            Evaluator(evaluation)  # reports the faulty sets of all ranks
        threads = max(1, available_cores() // gather.local_world_size())
        self._evaluator = Evaluator(evaluation, evaluation.shares(ranks)[rank], threads=threads)
        self.notes = [_describe(self.model, config), *self.terms.notes, *notes]
        self.chosen = {"student.batch_norm": self.model.batch_norm}
        norms = len(batch_norms(self.model.clip))
        if config.student.batch_norm is None and self.model.pretrained and norms:
            unused = ". train.compute.sync_batch_norm has no effect" * config.train.compute.sync_batch_norm
            self.notes.append(
                f"student.batch_norm: keep: {plural(norms, 'batch normalisation')} of the pretrained student use the "
                f"stored statistics, which stay; set it to train to let them move{unused}"
            )

    def begin_step(self, step: int, steps: int) -> str | None:
        """Train with rounded values in the share of the steps of ``student.quantize``, at least in the last one."""
        for kind, share in (self._config.student.quantize or {}).items():
            if kind != self.model.quantized and step >= steps - max(1, round(share * steps)):
                self.model.quantize(kind)
                return f"step {step + 1:,} and later ones train with {kind}, and keep their batch statistics"
        return None

    def prepare(self, batch: Batch) -> Batch:
        """Keep images, tokens and targets; add the targets of online teachers, and augment what the loaders left to do.

        Sample keys are dropped: torch.compile would treat them as constants and recompile for each batch.
        """
        if self._online_teachers or self._online_others:
            batch = online.add_targets(batch, self._online_teachers, self._online_others)
        if "records" in batch:
            batch = {**batch, IMAGE: augment(batch[IMAGE], batch["records"], self.model.image.height)}
        batch = {name: batch[name] for name in (IMAGE, CAPTION, SYNTHETIC, "targets") if name in batch}
        computed = {*self._online_teachers, *(name for name, _ in self._online_others)}
        return online.replace_unusable(batch, computed) if computed else batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms that need the batches of all ranks; see ``reinforce.student.terms``."""
        reduced = self._precision != "fp32"
        targets = batch.get("targets", {})
        rows = Rows(encoded.features, encoded.scalars, targets, reduced, self.model.heads)
        return self.terms.merged(lambda term: term.losses(rows))

    def shares(self, encoded: Encoded, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
        """Of each of several teachers its share of the losses that are means over teachers, ``loss``, and of the norms
        of their gradients with respect to the features, ``gradient``, over the first rows of the batch; and the pairs
        of which it is surest, ``rows``, if weights follow confidence.
        """
        features = {
            name: encoded.features[name][:_ROWS_OF_SHARES].detach().requires_grad_()
            for name in (IMAGE, CAPTION, SYNTHETIC)
            if name in encoded.features
        }
        targets = slice_batch(batch.get("targets", {}), 0, _ROWS_OF_SHARES)
        scalars = {name: value.detach() for name, value in encoded.scalars.items()}
        rows = Rows(features, scalars, targets, self._precision != "fp32", self.model.heads)
        found: dict[str, dict[str, torch.Tensor]] = {"loss": {}, "rows": {}}
        for term in self.terms.terms:
            for what, name, value in term.parts(rows):
                found[what][name] = found[what].get(name, 0) + value
        if len(found["loss"]) < 2:
            return {}
        found["gradient"] = {}
        for name, loss in found["loss"].items():
            gradients = torch.autograd.grad(loss, [*features.values()], retain_graph=True, allow_unused=True)
            squares = [one.double().square().sum() for one in gradients if one is not None]
            found["gradient"][name] = torch.stack(squares).sum().sqrt()
        for what in ("loss", "gradient"):
            total = torch.stack([value.detach().double() for value in found[what].values()]).sum()
            found[what] = {name: value.detach() / total for name, value in found[what].items()}
        return {what: values for what, values in found.items() if values}

    def evaluate(self, model: torch.nn.Module) -> Metrics:
        """Metrics of this rank's share of the sets under ``evaluate``, by the names in ``reinforce.evaluation``.

        ``parts`` are by set.
        """
        assert isinstance(model, StudentModel)
        device = str(next(model.parameters()).device)
        accelerator = Accelerator(device, self._precision)
        result = self._evaluator.evaluate_module(model.clip, model.image, self.tokenizer, accelerator)
        return Metrics(result.metrics, {name: one.part for name, one in result.sets.items() if one.part})

    def combine_evaluations(self, parts: Sequence[Metrics]) -> Metrics:
        """The metrics of all ranks in the order of the config; NaN for a set that failed."""
        evaluation = self._config.evaluate
        found = evaluation.combine(parts)
        sets = {name: part for of_rank in parts for name, part in of_rank.parts.items()}
        return Metrics({name: found.get(name, math.nan) for name in evaluation.metrics}, evaluation.parts(sets))

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """Write a folder that open_clip loads as model and tokenizer ``local-dir:FOLDER``."""
        assert isinstance(model, StudentModel)
        export(model, folder)


def read_stored(config: StudentConfig, manifests: Mapping[str, Mapping[str, Any]]) -> TargetModels:
    """The models whose targets a training run may take from datasets; ``manifests`` are their dataset.json by URL.

    Of the config, ``data`` and ``loss`` are read. Raises UserError if the datasets lack some or disagree.
    """
    data, loss = config.data, config.loss
    known: dict[str, TeacherInfo] = {}
    if not loss.online and (loss.reads_ensemble or loss.anchors):
        anchors_alone = config.model_copy(update={"data": data.model_copy(update={"teachers": []})})
        known = stored_teachers(config if loss.reads_ensemble else anchors_alone, manifests)
    kinds, images = text_kinds(data, manifests), data.images != "none"

    return TargetModels(
        known,
        kinds,
        images,
        partial(stored_models, data, manifests),
        moments=lambda section, name, covariance: stored_moments(
            data, config.seed, section, name, manifests, covariance
        ),
    )


def _describe(student: StudentModel, config: StudentConfig) -> str:
    millions = sum(parameter.numel() for parameter in student.clip.parameters()) / 1e6
    heads = sum(parameter.numel() for parameter in student.parameters()) / 1e6 - millions
    more = f" and {heads:.1f} M of its heads" if heads >= 0.05 else ""
    start = "pretrained" if student.pretrained else f"random weights of seed {config.seed}"
    if student.text_name != student.name:
        texts = "pretrained" if "text" in student.towers else "random"
        start += f", {texts} text tower of {student.text_name}, {student.config['embed_dim']} dimensions"
    return f"student {student.name}: {millions:.1f} M parameters{more}, {student.image.size} pixels, {start}"
