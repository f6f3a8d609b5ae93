"""Evaluation sets, read through once and found whole before anything is judged by them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.evaluation.classes import Template, class_names, groups_of, names_of_folders, templates_of
from reinforce.evaluation.config import RETRIEVAL, ZERO_SHOT, RetrievalSet, ZeroShotSet
from reinforce.evaluation.reading import (
    Example,
    File,
    captions_of,
    class_folders,
    json_field,
    kind_of,
    label_of,
    loader,
    samples,
    too_large,
)
from reinforce.source.shards import RawSample, Refusal
from schemas import Reason

Examples = Callable[[], Iterator[Example | Refusal]]


@dataclass(frozen=True)
class ZeroShot:
    """A classification set; targets of its examples are indices into ``classes``."""

    name: str
    classes: list[str]
    templates: list[Template]
    groups: Sequence[str | None] | None  # of each class; None for a class that no image has
    images: int  # with those that turn out to be refused
    examples: Examples


@dataclass(frozen=True)
class Retrieval:
    """A retrieval set; targets of its examples are the captions of the image."""

    name: str
    images: int
    examples: Examples


def zero_shot_set(name: str, config: ZeroShotSet, limits: Limits) -> ZeroShot:
    """Check a classification set and count its images. Raises UserError."""
    name = f"{ZERO_SHOT}/{name}"
    templates = templates_of(config.templates, name)
    kind = kind_of(config.images)
    if kind == "folder":
        return _of_folders(name, config, templates, limits)
    given = None if config.classes is None else class_names(config.classes, name)
    labels: list[int | str] = []
    group_of: dict[int | str, str] = {}
    images = 0
    for item in itertools.islice(samples(config.images, limits, name), config.limit):
        images += 1
        if isinstance(item, RawSample):
            labels.append(_label(item, config.label, name))
            if _in_data(config.groups):
                _note_group(group_of, labels[-1], item, str(config.groups), name)
    if not labels:
        raise UserError(f"{name}: no image in {config.images}.")
    classes = _classes_of(given, labels, config.label, name)
    index = _index(classes, labels, name)
    groups: Sequence[str | None] | None = None
    if _in_data(config.groups):
        by_class = {index[label]: group for label, group in group_of.items()}
        groups = [by_class.get(i) for i in range(len(classes))]
    elif config.groups is not None:
        groups = groups_of(config.groups, classes, name)

    def examples() -> Iterator[Example | Refusal]:
        for item in itertools.islice(samples(config.images, limits, name), config.limit):
            if isinstance(item, Refusal):
                yield item
            else:
                target = index[_label(item, config.label, name)]
                yield Example(item.key, functools.partial(bytes, item.image), target)

    return ZeroShot(name, classes, templates, groups, images, examples)


def retrieval_set(name: str, config: RetrievalSet, limits: Limits) -> Retrieval:
    """Check a retrieval set and count its images. Raises UserError."""
    name = f"{RETRIEVAL}/{name}"
    if kind_of(config.pairs) == "folder":
        raise UserError(
            f"{name}: {config.pairs} is a folder, neither shards nor a reinforced dataset: for shards in it write "
            f"{config.pairs}/*.tar."
        )

    def examples() -> Iterator[Example | Refusal]:
        for item in itertools.islice(samples(config.pairs, limits, name), config.limit):
            if isinstance(item, Refusal):
                yield item
            elif captions := captions_of(item.sidecars, config.captions, limits):
                yield Example(item.key, functools.partial(bytes, item.image), captions)
            else:
                yield Refusal(item.key, Reason.NO_TEXT, f"no caption at {', '.join(config.captions)}")

    images = pairs = 0
    for item in examples():
        images += 1
        pairs += isinstance(item, Example)
    if not pairs:
        raise UserError(
            f"{name}: none of {images} images in {config.pairs} has a caption at {', '.join(config.captions)}: say in "
            "`captions` where they stand."
        )
    return Retrieval(name, images, examples)


def _of_folders(name: str, config: ZeroShotSet, templates: list[Template], limits: Limits) -> ZeroShot:
    assert isinstance(config.images, str)
    if _in_data(config.groups):
        raise UserError(f"{name}: groups {config.groups!r} need shards; for folders give a mapping or a JSON file.")
    folders = class_folders(config.images, name)
    classes = names_of_folders(config.classes, list(folders), name)
    groups = None if config.groups is None else groups_of(config.groups, classes, name)
    files = _limited(list(folders.values()), config.limit)
    load = loader(config.images)

    def examples() -> Iterator[Example | Refusal]:
        for label, file in files:
            yield too_large(file, limits) or Example(file.key, functools.partial(load, file.path), label)

    return ZeroShot(name, classes, templates, groups, len(files), examples)


def _limited(folders: Sequence[list[File]], limit: int | None) -> list[tuple[int, File]]:
    """(label, file) of all, or of so many by turns from each class, so that a part is a part of every class."""
    if limit is not None:
        turns = itertools.chain.from_iterable(itertools.zip_longest(*folders))
        kept = {file.key for file in itertools.islice((file for file in turns if file is not None), limit)}
        folders = [[file for file in files if file.key in kept] for files in folders]
    return [(label, file) for label, files in enumerate(folders) for file in files]


def _label(sample: RawSample, field: str, where: str) -> int | str:
    label = label_of(sample.sidecars, field)
    if label is None:
        members = ", ".join(sorted(sample.sidecars)) or "none"
        raise UserError(
            f"{where}: {sample.key} has no label at {field} (beside the image it has: {members}): say in `label` "
            "where it stands, a member's extension or json:FIELD."
        )
    return label


def _classes_of(given: list[str] | None, labels: Sequence[int | str], field: str, where: str) -> list[str]:
    if given is not None:
        return given
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers:
        raise UserError(
            f"{where}: labels at {field} are numbers, such as {numbers[0]}: give `classes`, their names in order."
        )
    return sorted({label for label in labels if isinstance(label, str)})


def _index(classes: Sequence[str], labels: Sequence[int | str], where: str) -> Mapping[int | str, int]:
    """Label -> index of its class. Raises UserError for labels beyond the classes."""
    numbers = [label for label in labels if isinstance(label, int)]
    for label in (min(numbers, default=0), max(numbers, default=0)):
        if not 0 <= label < len(classes):
            raise UserError(
                f"{where}: label {label} is out of range: there are {len(classes)} classes, and labels count from 0. "
                f"Give {max(numbers) + 1} names in `classes`, or mend the labels."
            )
    index: dict[int | str, int] = {label: label for label in numbers}
    for position, name in enumerate(classes):
        index.setdefault(name, position)
    unknown = sorted({label for label in labels if label not in index}, key=str)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} labels are none of the {len(classes)} classes, such as {unknown[0]!r}: add "
            "them to `classes`, or mend the labels."
        )
    return index


def _in_data(groups: str | Mapping[str, str] | None) -> bool:
    return isinstance(groups, str) and groups.startswith("json:")


def _note_group(group_of: dict[int | str, str], label: int | str, sample: RawSample, field: str, where: str) -> None:
    group = json_field(sample.sidecars, field)
    if not isinstance(group, str):
        raise UserError(f"{where}: {sample.key} has no group at {field}, but {group!r}: want the name of one.")
    if group_of.setdefault(label, group) != group:
        raise UserError(
            f"{where}: class {label!r} has two groups, {group_of[label]!r} and (at {sample.key}) {group!r}: a class "
            "belongs to one."
        )
