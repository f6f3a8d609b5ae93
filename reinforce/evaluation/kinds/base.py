"""The interface of a kind of evaluation sets: the files of published sets below ROOT, and the classification sets of
users, their config and their labels, of class folders or of the samples of any source.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.classes import load_class_names, load_groups, name_folders
from reinforce.evaluation.reading import (
    ImageBatches,
    LabelledImage,
    SetReader,
    Table,
    detect_kind,
    input_of,
    is_json_field,
    list_class_folders,
    make_loader,
    read_json_field,
    read_label,
    read_samples,
)
from reinforce.evaluation.registry import HUB, SuiteSet
from reinforce.evaluation.report import Metrics, Outcome
from reinforce.images.policy import IMAGE_POLICY
from reinforce.settings import Section
from reinforce.source.config import Limits
from reinforce.source.formats.base import Columns
from reinforce.source.formats.parquet import ParquetFile
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.references import listed_state
from reinforce.source.samples import RawSample, Refusal, json_error
from reinforce.source.urls import Info, canonical, filesystem, read_whole, storage_errors
from reinforce.terminal import plural
from schemas import Reason

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import EvaluatedModels

CLASSES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_SHARDS = "test/nshards.txt"
#: The file of a layout that names its images, and their folder, below the folder of the set.
_ANNOTATIONS = {
    "sugarcrepe": ("data/{}.json", "val2017"),
    "xm3600": ("captions.jsonl", "images"),
    "sharegpt4v": ("share-captioner_coco_lcs_sam_1246k_1107.json", "sam/images"),
}
_ENDINGS = {"tables": ".parquet", "pairs": ".txt"}


@dataclass(frozen=True)
class SetFiles:
    """The files of a set: its ``folder`` and ``shards`` as URLs, and their ``state``.

    ``shards`` are tars or tables, the captions of layout ``pairs``, or the file that names the images; those of masks
    are listed when the set is opened. Equal states have equal content: a hash of names, sizes, and modification times
    or ETags, and of class names and templates. It is empty where a storage lists neither times nor ETags. Other states
    may have equal content, too.
    """

    folder: str
    shards: list[str]
    state: str


def find_files(one: SuiteSet, root: str) -> SetFiles | None:
    """Find the files of a set; None if there are none. Raises UserError for a part of a set."""
    if root == HUB and not one.on_hub:
        return None
    folder = one.place(root)
    fs, path = filesystem(folder)
    top = path.rstrip("/")
    fs.invalidate_cache()  # files may have changed since this process listed them
    with storage_errors(f"{canonical(folder)} cannot be listed", "Check the address."):
        try:
            shards: list[str] = []
            if one.layout in _ANNOTATIONS:
                name, images = _ANNOTATIONS[one.layout]
                name = name.format(one.key.rpartition("sugarcrepe_")[2])
                shards = [f"{folder}/{name}"]
                used = {f"{top}/{name}": fs.info(f"{top}/{name}")} | fs.find(f"{top}/{images}", detail=True)
            else:
                used = fs.find(path, detail=True)
                if not used:
                    return None
                if one.layout != "masks":
                    shards, used = _list_files(one, fs, used, top, folder)
            return SetFiles(folder, shards, _state(fs, path, used))
        except FileNotFoundError:
            return None


def find_set(one: SuiteSet, root: str) -> SetFiles:
    """The files of a set below ``root``. Raises UserError if there are none."""
    files = find_files(one, root)
    if files is None:
        raise UserError(f"{one.name} is {where_expected(one, root)}. Copy it there, or leave it out of `sets`.")
    return files


def where_expected(one: SuiteSet, root: str) -> str:
    """Where the files of a set should be, and where they are published."""
    return f"expected at {canonical(one.place(root))}; published at {one.page}"


def _list_files(
    one: SuiteSet, fs: Any, found: dict[str, Info], top: str, folder: str
) -> tuple[list[str], dict[str, Info]]:
    """The URLs of tars, tables or captions, and what is listed of the set's files. ``top`` is the path of ``folder``.

    Raises UserError if some are missing.
    """
    shown = canonical(folder)
    if one.layout != "tars":
        files = sorted(path for path in found if path.endswith(_ENDINGS[one.layout]))
        if not files:
            raise UserError(f"{shown} has no file that ends with {_ENDINGS[one.layout]}. {one.page} has the set.")
        tables = one.layout == "tables"  # captions are beside the images that they belong to
        urls = [str(fs.unstrip_protocol(path)) for path in files]
        return urls, {path: found[path] for path in files} if tables else found
    if f"{top}/{_SHARDS}" not in found:
        raise UserError(f"{shown} has no {_SHARDS}, which has the number of shards. Download it.")
    text = read_whole(fs, f"{top}/{_SHARDS}").decode("utf-8", "replace").strip()
    if not text.isdecimal() or not 0 < int(text) < 100_000:
        raise UserError(f"{shown}/{_SHARDS} is {text[:40]!r}, not the number of shards. Download it again.")
    names = [f"test/{number}.tar" for number in range(int(text))]
    paths = {f"{top}/{name}": name for name in (CLASSES, TEMPLATES, *names)}
    if missing := [name for path, name in paths.items() if path not in found]:
        raise UserError(f"{shown} has no {missing[0]}. Download the whole set.")
    return [f"{folder}/{name}" for name in names], {path: found[path] for path in paths}


def _state(fs: Any, path: str, used: Mapping[str, Info]) -> str:
    """``SetFiles.state`` of the files that are ``used``, by their paths in the file system."""
    versions = {}
    for name, info in used.items():
        version = _version(fs, name, info)
        if version is None:
            return ""
        small = name.endswith((CLASSES, TEMPLATES))
        versions[name[len(path) :]] = [*version, read_whole(fs, name).hex() if small else None]
    text = json.dumps(versions, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _version(fs: Any, path: str, info: Info) -> list[int | str | None] | None:
    """A value that changes with a file's content; None where the storage lists none."""
    if isinstance(fs, LocalFileSystem):
        try:
            found = os.stat(path)  # of the file that a link leads to
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    stamps = [listed_state(info).stamp, info.get("blob_id")]  # the second is the Hub's, a hash of the content
    return [info.get("size"), *stamps] if any(stamps) else None


def read_tables(one: SuiteSet, files: SetFiles, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the ``columns`` of each row of the set's tables. Raises UserError for damage."""
    for url in files.shards:
        shown = canonical(url)
        with storage_errors(f"{one.name}: {shown} cannot be read", "Download it again."), ParquetFile(url) as file:
            missing = [name for name in columns if name not in file.types]
            if missing:
                raise UserError(f"{one.name}: {shown} has no column {missing[0]}; it has {', '.join(file.types)}.")
            first, *others = columns
            for item in file.rows(Columns(first, None, {}, tuple(others), tuple(file.types))):
                if isinstance(item, RefusedFile):
                    raise UserError(f"{one.name}: {shown}: {item}. Download it again.")
                number, row = item
                yield f"{url.rpartition('/')[2]}:{number}", dict(row)


def image_bytes(image: object, key: str, where: str) -> bytes:
    """The encoded image in a column of Hugging Face. Raises UserError if it is not there."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise UserError(f"{where}: {key} has no image bytes; the published tables store each image.")
    return data


@dataclass(frozen=True)
class ImageSet:
    """A set that models can be evaluated on, with its name in messages.

    ``score`` gives the metrics of models on the images of ``examples``; none if no example can be used. ``count`` is
    the number of examples, with those that are refused, or 0 where it is not known before they are read. ``policy`` is
    the image policy of a set of the user.
    """

    name: str
    examples: SetReader
    score: Callable[[EvaluatedModels, ImageBatches], Outcome]
    count: int = 0
    policy: str = IMAGE_POLICY


class OwnSet(Section):
    """The config of a set of the user."""

    @property
    def scores(self) -> list[str]:
        """Names of the metrics, in order; all are between 0 and 1, and higher is better."""
        raise NotImplementedError

    @property
    def size(self) -> int | None:
        """Images at most, or None where this is not known before the set is opened."""
        raise NotImplementedError


class SetSource(Table):
    """Where the images of a set, or of a part of one, are."""

    limit: int | None = Field(None, ge=1, description="images to use, the first ones")

    @property
    def size(self) -> int | None:
        return self.limit


@dataclass(frozen=True)
class SetKind:
    """A kind of sets: its ``name`` in sets.csv, and ``open``, for a published set; None if no suite has such sets.

    Increase ``version`` with a change of the metrics after which a kept result would be another. If users have sets of
    the kind, ``section`` is the one of a config that has them by name, and ``open_own`` checks such a set and counts
    its images. Its arguments are the config of the set, its name in messages, limits, and the folders from which images
    that are stored by reference may be read.
    """

    name: str
    open: Callable[[SuiteSet, SetFiles], ImageSet] | None
    version: int = 1
    section: str = ""
    open_own: Callable[..., ImageSet] | None = None


#: Of ``top5``.
TOP = 5
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


def own_metrics(
    groups: Sequence[str | None] | None, _: object, labels: np.ndarray, ranks: np.ndarray, predicted: np.ndarray
) -> Metrics:
    """The metrics of a user's set. ``group`` is the share of images whose predicted class is in that of the true one.

    ``groups`` has the group of each class, None for one without images.
    """
    accuracies = classification_metrics(labels, ranks, predicted, TOP)
    scores: Metrics = dict(zip(("top1", "top5", "mean_per_class"), accuracies.values(), strict=True))
    if groups is not None:
        numbers: dict[str | None, int] = {name: i for i, name in enumerate(dict.fromkeys(groups)) if name is not None}
        group_of = np.array([*(numbers.get(name, -1) for name in groups), -1])  # the last: no class is predicted
        right = (group_of[predicted] == group_of[labels]) & (group_of[predicted] >= 0)
        scores["group"] = float(right.mean())
    return scores


def classification_metrics(labels: np.ndarray, ranks: np.ndarray, predicted: np.ndarray, classes: int) -> Metrics:
    """Return ``acc1``, ``acc5`` and ``mean_per_class_recall`` of N samples; the arrays are int64 [N].

    ``acc5`` is None for fewer than five classes.
    """
    return {
        "acc1": float((ranks == 0).mean()),
        "acc5": float((ranks < TOP).mean()) if classes >= TOP else None,
        "mean_per_class_recall": macro_recall(labels, predicted),
    }


def macro_recall(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur in ``labels``: balanced accuracy. int64 [N] each."""
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


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
