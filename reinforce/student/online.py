"""Online teachers: the baseline that runs teachers in the training loop instead of reading stored embeddings.

They get the augmentations and texts that the stored teachers got, so the targets are equal.

The statistics of balanced targets are fitted to the first ones of a training run: those of the first examples of
the datasets, in the order of their files, as a training run takes them: one augmentation of each image, the texts that
are read, and of each teacher its vectors of the images, of the true captions and of the synthetic ones, or its patches.
Stored targets are read and online ones computed, of the same examples.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import normalize

from reinforce.dataset.codecs import codebooks
from reinforce.dataset.codecs.plain import DEVIATION, MEAN
from reinforce.dataset.kinds.patches import PatchFeatures
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import TargetEncoder
from reinforce.errors import UserError
from reinforce.evaluation.encoding import encode_texts
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.examples import Example
from reinforce.student.data.stream import PartMaker, StreamedDataset
from reinforce.student.teachers import CAPTION, IMAGE, IMAGES, SYNTHETIC, TEXTS, TeacherInfo, same_model
from reinforce.student.terms.balance import Fit, Moments
from reinforce.student.terms.base import Tensors
from reinforce.training.order import GroupChunk
from reinforce.training.step import map_batch
from reinforce.training.task import Batch
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec, Teacher
from teachers.registry import load_model
from teachers.runtime import determinism
from teachers.spec import TeacherSpec

_LOG = logging.getLogger(__name__)
#: Largest number of images or texts in one forward pass.
_MAX_BATCH = 256


def load_teachers(specs: Mapping[str, TeacherSpec], device: str) -> dict[str, Teacher]:
    """Load the teachers on a device. Raises UserError if one cannot be loaded."""
    try:
        return {name: load_model(name, spec, device) for name, spec in specs.items()}
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(str(error)) from error


def other_targets(
    section: str, teachers: Mapping[str, Teacher], names: Sequence[str] | None, device: str
) -> dict[str, TargetEncoder]:
    """The targets of the kind of a ``target_section`` of the teachers in ``names``; None: of all that have one.

    Raises ValueError for the others.
    """
    [kind] = (kind for kind in KINDS.values() if kind.target_section == section)
    found = {}
    for name, teacher in teachers.items():
        if names is None or name in names:
            try:
                found[name] = kind.encoder(teacher, torch.device(device))
            except ValueError as error:
                if names is not None:
                    raise ValueError(f"teacher {name}: {error}") from error
                _LOG.warning("teacher %s: no %s are learnt: %s", name, section, error)
    return found


def teacher_info(teacher: Teacher, spec: TeacherSpec, texts: bool = True) -> TeacherInfo:
    """The description of a loaded teacher, with its side of texts only if there are ``texts``."""
    sides = {IMAGES} if teacher.image is not None else set()
    sides |= {TEXTS} if texts and callable(getattr(teacher, "encode_texts", None)) else set()
    source = "config: loss.teachers" if spec.logit_scale is not None else "model"
    return TeacherInfo(teacher.dim, frozenset(sides), teacher.logit_scale, source)


@torch.no_grad()
@determinism.inference()
def add_targets(
    batch: Batch, teachers: Mapping[str, Teacher], others: Sequence[tuple[str, TargetEncoder]] = ()
) -> Batch:
    """The batch with ``targets`` on its device, computed from its ``crops`` and ``texts``; see ``data/feed.py``.

    They are vectors of ``teachers`` at unit norm, of which half precision takes them away, and ``others``, each with
    the name of its teacher. Stored targets of other models stay.
    """
    device = batch["image"].device
    targets: dict[str, dict[str, torch.Tensor]] = dict(batch.get("targets", {}))
    for name in (*teachers, *(name for name, _ in others)):
        targets[name] = dict(targets.get(name, {}))  # a classifier may have the name of a teacher
    for name, target in others:
        targets[name][target.name] = _encode(target.encode, target.image, batch["crops"][name]).to(device)
    for name, teacher in teachers.items():
        if teacher.image is not None:
            vectors = _encode(teacher.encode_images, teacher.image, batch["crops"][name])
            targets[name][IMAGE] = normalize(vectors, dim=-1).to(device)
        if callable(getattr(teacher, "encode_texts", None)):
            for kind, texts in batch["texts"].items():
                targets[name][kind] = normalize(encode_texts(teacher, texts, _MAX_BATCH), dim=-1).to(device)
    return {**batch, "targets": targets}


def replace_unusable(batch: Batch, teachers: Collection[str]) -> Batch:
    """The batch, a mapping of tensors, without the rows of which a teacher gives NaN, infinity or a vector of zeros.

    The next usable row takes the place of each, so that the batch keeps its size. A batch without a usable row stays.
    """
    usable = torch.ones(len(batch[IMAGE]), dtype=torch.bool, device=batch[IMAGE].device)
    for name in teachers:
        for what, values in batch["targets"][name].items():
            flat = values.reshape(len(values), -1)
            usable &= flat.isfinite().all(dim=1)
            if what in (IMAGE, CAPTION, SYNTHETIC):
                usable &= flat.any(dim=1)
    places = usable.nonzero().flatten()
    if len(places) in (0, len(usable)):
        return batch
    following = torch.searchsorted(places, torch.arange(len(usable), device=places.device))
    _LOG.warning(
        "targets of online teachers are NaN or zero in %d of %d rows of a batch; others replace these",
        len(usable) - len(places),
        len(usable),
    )
    rows = places[following % len(places)]
    return map_batch(batch, lambda values: values[rows])


def _encode(encode: Callable[[torch.Tensor], torch.Tensor], spec: ImageSpec, crops: torch.Tensor) -> torch.Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, ...]."""
    # Each part is copied: the teacher may reuse its memory in the next call.
    parts = [encode(to_pixels(part, spec)).clone() for part in crops.split(_MAX_BATCH)]
    return torch.cat(parts).float()  # a new tensor: parts may be inference tensors, which autograd refuses


_VECTORS, _GRIDS = 4096, 1024  # examples
_AT_ONCE = 64

#: The targets of a teacher of some examples of a dataset, by what they are of.
_TargetsOf: TypeAlias = Callable[[StreamedDataset, Sequence[Example]], Tensors]


def stored_moments(
    data: Data, seed: int, section: str, name: str, manifests: Mapping[str, Mapping[str, Any]], covariance: bool
) -> dict[str, Moments]:
    """The moments of the stored targets of a teacher by what they are of; for patches, as ``patch_moments`` has them.

    Raises UserError.
    """

    def read(dataset: StreamedDataset, examples: Sequence[Example]) -> Tensors:
        columns = zip(*(example.targets for example in examples), strict=True)
        return {
            target.name: torch.stack([torch.from_numpy(np.asarray(one)) for one in column])
            for target, column in zip(dataset.targets, columns, strict=True)
        }

    datasets = [one.without_images() for one in open_datasets(data, seed, {"teachers": [], section: [name]})]
    if section == "teachers":
        return _fit(datasets, name, read, _VECTORS, covariance)
    found = _channels(manifests, name)
    assert found is not None  # data sets of several codebooks are refused
    channels: dict[str, Moments] = {}
    for what, one in _fit(datasets, name, read, _GRIDS, True).items():
        assert one.covariance is not None
        raw = one.covariance * torch.outer(found.deviation, found.deviation)  # stored grids are standardised by channel
        channels[what] = found._replace(covariance=raw)
    return channels


def online_moments(
    data: Data, seed: int, name: str, teacher: Teacher, device: str, covariance: bool
) -> dict[str, Moments]:
    """The moments of the vectors that a loaded teacher gives, by what they are of. Raises UserError."""
    datasets = open_datasets(data, seed, {"teachers": []})
    return _fit(datasets, name, _Online(datasets, name, device, {name: teacher}), _VECTORS, covariance)


def patch_moments(
    data: Data,
    seed: int,
    name: str,
    encoder: TargetEncoder,
    spec: TeacherSpec,
    manifests: Mapping[str, Mapping[str, Any]],
    device: str,
    covariance: bool,
) -> dict[str, Moments]:
    """The moments of the patches of a loaded teacher: those of the codebooks of the datasets, if they have one and the
    same for this model, so that online targets equal the stored ones, or else those of the first grids. The covariance
    is always of these.

    Raises UserError.
    """
    found = _channels(manifests, name, spec)
    known = found is not None and len(found.mean) == encoder.entry["dim"]
    if found is not None and known and not covariance:
        return {encoder.name: found}
    datasets = open_datasets(data, seed, {"teachers": []})
    fitted = _fit(datasets, name, _Online(datasets, name, device, others=[(name, encoder)]), _GRIDS, covariance)
    if found is None or not known:
        return fitted
    return {what: found._replace(covariance=one.covariance) for what, one in fitted.items()}


def _channels(manifests: Mapping[str, Mapping[str, Any]], name: str, spec: TeacherSpec | None = None) -> Moments | None:
    """Mean and deviation of the channels of a teacher's stored patches; None unless all datasets have the same."""
    places = [codebook_of_patches(url, manifest, name, spec) for url, manifest in manifests.items()]
    if not places or None in places or len({place and place.digest for place in places}) > 1:
        return None
    assert places[0] is not None
    arrays = codebooks.load(places[0]).arrays
    return Moments(*(torch.from_numpy(arrays[key].copy()) for key in (MEAN, DEVIATION)))


def codebook_of_patches(
    url: str, manifest: Mapping[str, Any], name: str, spec: TeacherSpec | None = None
) -> codebooks.Place | None:
    """The codebook of a teacher's patches in a dataset; None if there is none, or it is of another model than this."""
    layer = PatchFeatures.pattern.replace("*", name)
    digest = (manifest["layers"].get(layer, {}).get("codebook") or {}).get("digest")
    if digest is None or (spec is not None and not same_model(manifest["teachers"].get(name, {}), spec)):
        return None
    return codebooks.Place(url, layer, digest)


class _Online:
    """Computes the targets of a teacher, from the crops and texts that it gets in a training run."""

    def __init__(
        self,
        datasets: Sequence[StreamedDataset],
        name: str,
        device: str,
        teachers: Mapping[str, Teacher] | None = None,
        others: Sequence[tuple[str, TargetEncoder]] = (),
    ) -> None:
        self._name, self._device, self._teachers, self._others = name, device, teachers or {}, others
        crop = max(dataset.size for dataset in datasets)
        self._maker = PartMaker(0, (), lambda texts: torch.empty(len(texts), 0), crop)

    def __call__(self, dataset: StreamedDataset, examples: Sequence[Example]) -> Tensors:
        part = self._maker.make([*examples], self._maker.allocate(len(examples)), Counter())
        assert part.buffers is not None
        crops = part.buffers.crop.to(self._device)
        kinds = zip(dataset.spec.kinds, zip(*part.texts, strict=True), strict=False)
        texts = {kind: [*of_kind] for kind, of_kind in kinds}
        batch = {"image": crops, "crops": {self._name: crops}, "texts": texts}
        found: Tensors = add_targets(batch, self._teachers, self._others)["targets"][self._name]
        return found


def _fit(
    datasets: Sequence[StreamedDataset], teacher: str, targets_of: _TargetsOf, count: int, covariance: bool = False
) -> dict[str, Moments]:
    """The moments of a teacher's targets of the first examples, by what they are of. Raises UserError."""
    _LOG.info("teacher %s: fitting statistics to its targets of the first %d examples", teacher, count)
    fits: dict[str, Fit] = {}
    for dataset, examples in _first_examples(datasets, count):
        for what, values in targets_of(dataset, examples).items():
            fits.setdefault(what, Fit(covariance)).add(values)
    urls = " and ".join(dataset.url for dataset in datasets)
    if not fits:
        raise UserError(f"{urls}: none of the first samples can be used. {datasets[0].hint(())}")
    found = {}
    for what, one in fits.items():
        try:
            found[what] = one.moments()
        except ValueError as error:
            raise UserError(
                f"teacher {teacher}: of its first targets of {what} in {urls}, {error}. Look at the datasets, and at "
                "the teacher."
            ) from None
    return found


def _first_examples(datasets: Sequence[StreamedDataset], count: int) -> Iterator[tuple[StreamedDataset, list[Example]]]:
    """About ``count`` examples of epoch 0 in the order of the files, a few at a time; of each dataset by its weight."""
    total = sum(dataset.weight for dataset in datasets)
    for dataset in datasets:
        left = math.ceil(count * dataset.weight / total)
        for group, rows in enumerate(dataset.groups[:, 2].tolist()):
            for first in range(0, rows, _AT_ONCE):
                if left <= 0:
                    break
                loaded = dataset.load(GroupChunk(group, first, min(first + _AT_ONCE, rows)), 0, keep=True).rows
                examples = [example for example in loaded if example is not None][:left]
                left -= len(examples)
                if examples:
                    yield dataset, examples
