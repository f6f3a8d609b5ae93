"""Evaluation sets; each is read and checked once before a model is evaluated."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.evaluation.classes import Template, load_class_names, load_groups, load_templates, name_folders
from reinforce.evaluation.config import RETRIEVAL, ZERO_SHOT, RetrievalSet, ZeroShotSet
from reinforce.evaluation.fields import is_json_field, read_captions, read_json_field, read_label
from reinforce.evaluation.reading import (
    Example,
    File,
    check_file_size,
    detect_kind,
    input_of,
    list_class_folders,
    make_loader,
    read_samples,
)
from reinforce.source.captions import json_error
from reinforce.source.samples import RawSample, Refusal
from schemas import Reason

#: Further columns of a label of this name.
_LABELS = {"cls": ("label",)}

Examples = Callable[[], Iterator[Example | Refusal]]


@dataclass(frozen=True)
class ZeroShot:
    """A classification set; targets of its examples are indices into ``classes``."""

    name: str
    classes: list[str]
    templates: list[Template]
    groups: Sequence[str | None] | None  # of each class; None for a class without images
    images: int  # including those that cannot be decoded
    examples: Examples


@dataclass(frozen=True)
class Retrieval:
    """A retrieval set; targets of its examples are the captions of the image."""

    name: str
    images: int
    examples: Examples


def open_zero_shot_set(name: str, config: ZeroShotSet, limits: Limits, images_from: Sequence[str] = ()) -> ZeroShot:
    """Check a classification set and count its images. Raises UserError."""
    name = f"{ZERO_SHOT}/{name}"
    templates = load_templates(config.templates, name)
    if config.format is None and config.view is None and detect_kind(config.images) == "classes":
        return _open_folders(name, config, templates, limits)
    given = None if config.classes is None else load_class_names(config.classes, name)
    labels: list[int | str] = []
    group_of: dict[int | str, str] = {}
    images = 0
    spec = input_of(limits, images_from, [config.label], config)
    fields = [field for field in (config.label, config.groups) if is_json_field(field)]

    def samples() -> Iterator[RawSample | Refusal]:
        for item in itertools.islice(read_samples(config.images, spec, name), config.limit):
            yield (fields and isinstance(item, RawSample) and _broken_json(item)) or item

    for item in samples():
        images += 1
        if isinstance(item, RawSample):
            labels.append(_require_label(item, config.label, name))
            if is_json_field(config.groups):
                _record_group(group_of, labels[-1], item, str(config.groups), name)
        last = item
    if not images:
        raise UserError(f"{name}: no image in {config.images}. Check the URL of the set.")
    if isinstance(last, Refusal) and not labels:
        raise UserError(f"{name}: every image in {config.images} is refused, the last ({last.key}): {last.detail}.")
    classes = _choose_classes(given, labels, config.label, name)
    index = _index_labels(classes, labels, name)
    groups: Sequence[str | None] | None = None
    if is_json_field(config.groups):
        by_class = {index[label]: group for label, group in group_of.items()}
        groups = [by_class.get(i) for i in range(len(classes))]
    elif config.groups is not None:
        groups = load_groups(config.groups, classes, name)

    def examples() -> Iterator[Example | Refusal]:
        for item in samples():
            if isinstance(item, Refusal):
                yield item
            else:
                target = index[_require_label(item, config.label, name)]
                yield Example(item.key, functools.partial(bytes, item.image), target)

    return ZeroShot(name, classes, templates, groups, images, examples)


def open_retrieval_set(name: str, config: RetrievalSet, limits: Limits, images_from: Sequence[str] = ()) -> Retrieval:
    """Check a retrieval set and count its images. Raises UserError."""
    name = f"{RETRIEVAL}/{name}"
    spec = input_of(limits, images_from, config.captions, config)

    def examples() -> Iterator[Example | Refusal]:
        for item in itertools.islice(read_samples(config.pairs, spec, name), config.limit):
            if isinstance(item, Refusal):
                yield item
            elif captions := read_captions(item.all_sidecars, config.captions, limits):
                yield Example(item.key, functools.partial(bytes, item.image), captions)
            else:
                yield Refusal(item.key, Reason.NO_TEXT, f"no caption at {', '.join(config.captions)}")

    images = pairs = 0
    for item in examples():
        images += 1
        pairs += isinstance(item, Example)
    if not pairs:
        raise UserError(
            f"{name}: none of {images} images in {config.pairs} has a caption at {', '.join(config.captions)}: set "
            "`captions` to where they are."
        )
    return Retrieval(name, images, examples)


def _open_folders(name: str, config: ZeroShotSet, templates: list[Template], limits: Limits) -> ZeroShot:
    assert isinstance(config.images, str)
    if is_json_field(config.groups):
        raise UserError(f"{name}: groups {config.groups!r} need shards; for folders use a mapping or a JSON file.")
    folders = list_class_folders(config.images, name)
    classes = name_folders(config.classes, list(folders), name)
    groups = None if config.groups is None else load_groups(config.groups, classes, name)
    files = _select_files(list(folders.values()), config.limit)
    load = make_loader(config.images)

    def examples() -> Iterator[Example | Refusal]:
        for label, file in files:
            yield check_file_size(file, limits) or Example(file.key, functools.partial(load, file.path), label)

    return ZeroShot(name, classes, templates, groups, len(files), examples)


def _select_files(folders: Sequence[list[File]], limit: int | None) -> list[tuple[int, File]]:
    """Return (label, file) of all images, or of ``limit`` images taken in turn from each class."""
    if limit is not None:
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*folders))
        kept = {file.key for file in itertools.islice((file for file in in_turn if file is not None), limit)}
        folders = [[file for file in files if file.key in kept] for files in folders]
    return [(label, file) for label, files in enumerate(folders) for file in files]


def _broken_json(sample: RawSample) -> Refusal | None:
    """A refusal if the JSON of a sample is broken or was not read; its label is not known."""
    data = sample.all_sidecars.get("json")
    fault = None if data is None else json_error(data)
    return (
        sample.left_out.get("json") if fault is None else Refusal(sample.key, Reason.SIDECAR_BROKEN, f".json: {fault}")
    )


def _require_label(sample: RawSample, field: str, where: str) -> int | str:
    label = read_label(sample.all_sidecars, field)
    if label is None and sample.columns is not None and not is_json_field(field):
        of_column = (read_label(sample.all_sidecars, f"json:{name}") for name in (field, *_LABELS.get(field, ())))
        label = next((found for found in of_column if found is not None), None)
    if label is None:
        members = ", ".join(sample.columns or sorted(sample.sidecars)) or "none"
        what = "other members" if sample.columns is None else "columns"
        raise UserError(
            f"{where}: {sample.key} has no label at {field} (its {what}: {members}): set `label` to "
            f"{'a column' if sample.columns else 'the extension of a member or json:FIELD'}."
        )
    return label


def _choose_classes(given: list[str] | None, labels: Sequence[int | str], field: str, where: str) -> list[str]:
    if given is not None:
        return given
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers:
        raise UserError(
            f"{where}: labels at {field} are numbers, such as {numbers[0]}: give `classes`, the names in label order."
        )
    return sorted({label for label in labels if isinstance(label, str)})


def _index_labels(classes: Sequence[str], labels: Sequence[int | str], where: str) -> Mapping[int | str, int]:
    """Map each label to its class index. Raises UserError for labels that no class has."""
    numbers = [label for label in labels if isinstance(label, int)]
    for label in (min(numbers, default=0), max(numbers, default=0)):
        if not 0 <= label < len(classes):
            raise UserError(
                f"{where}: label {label} is out of range: there are {len(classes)} classes, and labels count from 0. "
                f"Give {max(numbers) + 1} names in `classes`, or fix the labels."
            )
    index: dict[int | str, int] = {label: label for label in numbers}
    for position, name in enumerate(classes):
        index.setdefault(name, position)
    unknown = sorted({label for label in labels if label not in index}, key=str)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} labels are not among the {len(classes)} classes, such as {unknown[0]!r}: add "
            "them to `classes`, or fix the labels."
        )
    return index


def _record_group(group_of: dict[int | str, str], label: int | str, sample: RawSample, field: str, where: str) -> None:
    group = read_json_field(sample.all_sidecars, field)
    if not isinstance(group, str):
        raise UserError(f"{where}: {sample.key} has no group at {field}, but {group!r}: want a group name.")
    if group_of.setdefault(label, group) != group:
        raise UserError(
            f"{where}: class {label!r} has two groups, {group_of[label]!r} and (at {sample.key}) {group!r}: each "
            "class needs exactly one."
        )
