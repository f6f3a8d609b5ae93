"""A user's classification set: its config, and its labels, of class folders or of the samples of any source."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.classes import load_class_names, load_groups, name_folders
from reinforce.evaluation.kinds.base import OwnSet, SetSource
from reinforce.evaluation.reading import (
    LabelledImage,
    SetReader,
    detect_kind,
    input_of,
    is_json_field,
    list_class_folders,
    make_loader,
    read_json_field,
    read_label,
    read_samples,
)
from reinforce.source.config import Limits
from reinforce.source.samples import RawSample, Refusal, json_error
from reinforce.terminal import plural
from schemas import Reason

#: Further columns of a label of this name.
_LABELS = {"cls": ("label",)}


class LabelledSource(SetSource):
    """Images with classes."""

    images: str | list[str] = Field(
        min_length=1,
        description="a folder with one folder per class, or what `source` of a run may be, by any fsspec URI: tars, "
        "Parquet, jsonl or csv files, or a reinforced dataset",
    )
    classes: str | list[str] | None = Field(
        None,
        description="class names in label order: a list, a text file with one per line, or `imagenet` (whose folders "
        "are named by WordNet ids); default: the folder names, or the names that the labels give, sorted",
    )
    label: str = Field(
        "cls",
        description="of shards: extension of the member with the image's class, or json:FIELD; an integer is an index "
        "into the classes, text is a class name; of tables: the column, by default `cls`, else `label`",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="images to use: of shards the first ones, of folders an equal share of each class",
    )


class ZeroShotSet(LabelledSource, OwnSet):
    """A classification set: images with classes."""

    templates: str | list[str] = Field(
        "simple",
        description="`openai` (80), `simple` (7), `none`, a text file with one per line, or a list; {} (or {c}) is the "
        "class name",
    )
    groups: str | dict[str, str] | None = Field(
        None,
        description="the group of each class: a mapping, a JSON file with a mapping, or json:FIELD of the samples; "
        "adds the metric `group`, the share of images whose predicted class is in the right group",
    )

    @property
    def scores(self) -> list[str]:
        return ["top1", "top5", "mean_per_class"] + ["group"] * (self.groups is not None)


class Labelled(NamedTuple):
    """A set that is checked. ``groups`` has the group of each class, None for a class without images.

    ``images`` is their number with those that cannot be decoded, ``counts`` that of each class; targets of ``examples``
    are indices into ``classes``.
    """

    classes: list[str]
    groups: Sequence[str | None] | None
    images: int
    counts: Sequence[int]
    examples: SetReader


def read_labels(
    config: LabelledSource,
    name: str,
    limits: Limits,
    images_from: Sequence[str],
    groups: str | Mapping[str, str] | None = None,
    *,
    numbers: bool = False,
) -> Labelled:
    """Check a set, for which the labels of all samples are read once. Raises UserError where they fit no classes.

    With ``numbers``, labels that are numbers need no ``classes``: each is a class, named by its digits.
    """
    if config.format is None and config.view is None and detect_kind(config.images) == "classes":
        return _read_folders(config, name, limits, groups)
    given = None if config.classes is None else load_class_names(config.classes, name)
    labels: list[int | str] = []
    group_of: dict[int | str, str] = {}
    images = 0
    spec = input_of(limits, images_from, [config.label], config)
    fields = [field for field in (config.label, groups) if is_json_field(field)]

    def samples() -> Iterator[RawSample | Refusal]:
        for item in itertools.islice(read_samples(config.images, spec, name), config.limit):
            broken = None
            if fields and isinstance(item, RawSample):  # else the label of a sample with broken JSON is not known
                data = item.all_sidecars.get("json")
                broken = item.left_out.get("json")
                if data is not None and (fault := json_error(data)) is not None:
                    broken = Refusal(item.key, Reason.SIDECAR_BROKEN, f".json: {fault}")
            yield broken or item

    for item in samples():
        images += 1
        if isinstance(item, RawSample):
            labels.append(_require_label(item, config.label, name))
            if is_json_field(groups):
                _record_group(group_of, labels[-1], item, str(groups), name)
        last = item
    if not images:
        raise UserError(f"{name}: no image in {config.images}. Check the URL of the set.")
    if isinstance(last, Refusal) and not labels:
        raise UserError(f"{name}: every image in {config.images} is refused, the last ({last.key}): {last.detail}.")
    if numbers and not given:
        classes = sorted({*map(str, labels)})
        number_of = {text: number for number, text in enumerate(classes)}
        index: Mapping[int | str, int] = {label: number_of[str(label)] for label in {*labels}}
    else:
        classes = given or _names_of(labels, config.label, name)
        index = _index_labels(classes, labels, name)
    of_classes: Sequence[str | None] | None = None
    if is_json_field(groups):
        by_class = {index[label]: group for label, group in group_of.items()}
        of_classes = [by_class.get(i) for i in range(len(classes))]
    elif groups is not None:
        of_classes = load_groups(groups, classes, name)

    def examples() -> Iterator[LabelledImage | Refusal]:
        for item in samples():
            if isinstance(item, Refusal):
                yield item
            else:
                target = index[_require_label(item, config.label, name)]
                yield LabelledImage(item.key, functools.partial(bytes, item.image), target)

    return Labelled(classes, of_classes, images, _count(classes, (index[label] for label in labels)), examples)


def _count(classes: Sequence[str], labels: Iterable[int]) -> list[int]:
    counts = Counter(labels)
    return [counts[number] for number in range(len(classes))]


def _read_folders(
    config: LabelledSource, name: str, limits: Limits, groups: str | Mapping[str, str] | None
) -> Labelled:
    assert isinstance(config.images, str)
    if is_json_field(groups):
        raise UserError(f"{name}: groups {groups!r} need shards; for folders use a mapping or a JSON file.")
    folders = list_class_folders(config.images, name)
    classes = name_folders(config.classes, list(folders), name)
    of_classes = None if groups is None else load_groups(groups, classes, name)
    chosen = [*folders.values()]
    if config.limit is not None:  # images taken in turn from each class
        in_turn = (file for file in itertools.chain.from_iterable(itertools.zip_longest(*chosen)) if file is not None)
        kept = {file.key for file in itertools.islice(in_turn, config.limit)}
        chosen = [[file for file in of_class if file.key in kept] for of_class in chosen]
    files = [(label, file) for label, of_class in enumerate(chosen) for file in of_class]
    load = make_loader(config.images)

    def examples() -> Iterator[LabelledImage | Refusal]:
        for label, file in files:
            if file.size <= limits.image_bytes:
                yield LabelledImage(file.key, functools.partial(load, file.path), label)
            else:
                above = f"{file.size} bytes, above limits.image_bytes of {limits.image_bytes}"
                yield Refusal(file.key, Reason.IMAGE_BYTES, above)

    return Labelled(classes, of_classes, len(files), _count(classes, (label for label, _ in files)), examples)


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


def _names_of(labels: Sequence[int | str], field: str, where: str) -> list[str]:
    """The classes that labels name, sorted."""
    number = next((label for label in labels if isinstance(label, int)), None)
    if number is not None:
        raise UserError(
            f"{where}: labels at {field} are numbers, such as {number}: give `classes`, the names in label order."
        )
    return sorted({label for label in labels if isinstance(label, str)})


def _index_labels(classes: Sequence[str], labels: Sequence[int | str], where: str) -> Mapping[int | str, int]:
    """Map each label to its class index. Raises UserError for labels that no class has."""
    index: dict[int | str, int] = {number: number for number in range(len(classes))}
    for position, name in enumerate(classes):
        index.setdefault(name, position)
    if unknown := sorted({*labels} - index.keys(), key=str):
        raise UserError(
            f"{where}: {plural(len(unknown), 'label')} without a class among {len(classes)}, such as {unknown[0]!r}: "
            "add classes to `classes`, which numbers count from 0, or fix the labels."
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
