"""Reading of evaluation sets: class folders, reinforced datasets, sources of runs, and labels and captions in them.

Labels and captions of a sample are read from its sidecars at a member's extension or at ``json:FIELD``, captions also
by an expression of JMESPath (https://jmespath.org) over the JSON of the sample.

Images become uint8 batches: they are decoded ahead in threads, and cached if they fit into memory. Their content is
hashed while it is read: what a kept result was made of. Images, labels, captions, metadata, class names and templates
count, in their order. Names of files and keys of samples do not, so that a copy in other shards is the same set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import posixpath
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from pydantic import AfterValidator, Field

from reinforce.dataset.reading import Dataset
from reinforce.dataset.store import MANIFEST
from reinforce.errors import UserError
from reinforce.images.policy import IMAGE_POLICY, ImageRefused, decode
from reinforce.processes.attempts import prefetch
from reinforce.settings import LayerName, Section
from reinforce.source.config import Format, Input, Limits
from reinforce.source.file_types import is_image_name
from reinforce.source.formats import base
from reinforce.source.formats.base import Shard, source_format
from reinforce.source.samples import RawSample, Refusal, T, caption_of, metadata_of, parse_json, texts_of
from reinforce.source.urls import COMPRESSIONS, canonical, expand, filesystem, shard_names, storage_errors
from reinforce.terminal import plural
from schemas import TRUE_CAPTIONS, Reason
from teachers.fit import fit
from teachers.protocols import ImageSpec

#: How a user allows images that a dataset stores by reference, for ``Dataset``.
IMAGES_KEY = 'evaluate.images_from: ["{0}"], or --set images_from="{0}" on the command line'
LINES = "lines:"
_JSON = "json:"
_JMESPATH = "jmespath:"


def is_json_field(value: object) -> bool:
    """Whether a config value has the form ``json:FIELD``."""
    return isinstance(value, str) and value.startswith(_JSON)


def is_in_json(field: str) -> bool:
    """Whether the captions at a field are in the JSON of the sample, and in no member of their own."""
    return field.startswith((_JSON, _JMESPATH))


def _check_caption_field(field: str) -> str:
    if field.startswith(_JMESPATH):
        import jmespath

        try:
            jmespath.compile(field.removeprefix(_JMESPATH))
        except jmespath.exceptions.JMESPathError as error:
            raise ValueError(f"{field!r} is no expression of JMESPath: {str(error).splitlines()[0]}") from error
    return field


#: Where a config finds captions, in the forms of ``read_captions``.
CaptionFields = Annotated[
    list[Annotated[str, AfterValidator(_check_caption_field)]],
    Field(
        min_length=1,
        description="where to find an image's captions, first hit wins: a member's extension, lines:EXTENSION for one "
        "caption per line, json:FIELD (text or a list of texts), or jmespath:EXPRESSION over the JSON; `txt` of a "
        "reinforced dataset is its caption; of tables: COLUMN, or json:COLUMN for all texts of a list",
    ),
]


def read_label(sidecars: Mapping[str, bytes], field: str) -> int | str | None:
    """Return a class index or class name; None where there is none.

    A member that holds an integer is an index, even if a class has that name. In JSON the type decides.
    """
    if is_json_field(field):
        value = read_json_field(sidecars, field)
        return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    text = sidecars.get(field, b"").decode("utf-8-sig", "replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def read_captions(sidecars: Mapping[str, bytes], fields: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """Return the distinct captions at the first field that has any, cleaned by the caption policy.

    ``lines:EXTENSION`` holds one caption per line. ``json:FIELD`` and the result of ``jmespath:EXPRESSION`` are a text
    or a list of texts.
    """
    for place in fields:
        texts: list[bytes] = []
        if place.startswith(LINES):
            texts = sidecars.get(place.removeprefix(LINES), b"").splitlines()
        elif is_in_json(place):
            value = None
            if is_json_field(place):
                value = read_json_field(sidecars, place)
            else:
                import jmespath  # loaded only for configs that have such a place

                with suppress(jmespath.exceptions.JMESPathError):  # the JSON has values of other types than it needs
                    value = jmespath.search(place.removeprefix(_JMESPATH), parse_json(sidecars.get("json", b"")))
            texts = [text.encode("utf-8", "replace") for text in texts_of(value)]
        elif place in sidecars:
            texts = [sidecars[place]]
        cleaned = (caption_of({"txt": text}, ["txt"], limits) for text in texts)
        captions = tuple(dict.fromkeys(caption for caption in cleaned if caption))
        if captions:
            return captions
    return ()


def read_json_field(sidecars: Mapping[str, bytes], field: str) -> Any:
    """Return the value at ``json:FIELD``; None where there is none."""
    name = field.removeprefix(_JSON)
    metadata = metadata_of(sidecars, [name])
    return None if metadata is None else json.loads(metadata)[name]


class Table(Section):
    """How the files of a set are read, beside their names."""

    format: Format | None = Field(
        None, description="what the files are; default: recognised by their names, else by the first file"
    )
    image: str | None = Field(
        None, description="column of a table with the images, or with their paths or URLs; default: as in a run"
    )
    view: LayerName | None = Field(
        None, description="of a reinforced dataset: view of `reinforce select` whose samples are read; default: all"
    )


@dataclass(frozen=True)
class LabelledImage:
    """One image of a set. ``target`` is its label, or its captions.

    ``fit`` makes uint8 [height, width, 3] of the decoded image for the input of a model.
    """

    key: str
    load: Callable[[], bytes]  # the encoded image
    target: Any
    fit: Callable[[Image.Image, ImageSpec], np.ndarray] = fit


#: Reads a set: yields its images in order, each time the same.
SetReader = Callable[[], Iterator[LabelledImage | Refusal]]


@dataclass(frozen=True)
class SetFile:
    """An image file in a class folder."""

    key: str  # path relative to the set's folder
    path: str  # in the file system's own form
    size: int


def detect_kind(urls: str | Sequence[str]) -> Literal["classes", "layers", "shards"]:
    """Return what a set's URL refers to: a directory has the layers of a dataset, or a folder for each class.

    Raises UserError where the storage cannot be reached.
    """
    if not isinstance(urls, str) or canonical(urls).lower().endswith((*COMPRESSIONS, ".txt")):
        return "shards"
    fs, path = filesystem(urls)
    with storage_errors(f"{canonical(urls)} cannot be reached", "Check the URL and your credentials for it."):
        if not fs.isdir(path):
            return "shards"
        return "layers" if fs.isfile(posixpath.join(path, MANIFEST)) else "classes"


def list_class_folders(url: str, where: str) -> dict[str, list[SetFile]]:
    """List images by class folder, at any depth; both are sorted, hidden names are skipped. Raises UserError."""
    fs, root = filesystem(url)
    names: list[str] = []
    files: list[SetFile] = []
    if isinstance(fs, LocalFileSystem):
        for folder, subfolders, inside in os.walk(root, followlinks=True):  # sets often consist of links
            names = names or subfolders
            for path in (os.path.join(folder, name) for name in inside):
                size = os.path.getsize(path) if os.path.exists(path) else 0  # a broken link fails when it is read
                files.append(SetFile(os.path.relpath(path, root).replace(os.sep, "/"), path, size))
    else:
        top = root.rstrip("/")
        entries = fs.ls(top, detail=True)
        names = [posixpath.basename(str(e["name"]).rstrip("/")) for e in entries if e["type"] == "directory"]
        for path, info in fs.find(top, detail=True).items():
            files.append(SetFile(path[len(top) :].lstrip("/"), path, int(info["size"] or 0)))
    folders: dict[str, list[SetFile]] = {name: [] for name in sorted(names) if not name.startswith(".")}
    shown = canonical(url)
    loose: list[SetFile] = []
    for file in sorted(files, key=lambda file: file.key):
        if is_image_name(file.key) and not any(part.startswith(".") for part in file.key.split("/")):
            name, slash, _ = file.key.partition("/")
            (folders[name] if slash else loose).append(file)
    if not folders:
        raise UserError(f"{where}: {shown} has no class folder; to read shards in it write {shown}/*.tar.")
    if loose:
        raise UserError(
            f"{where}: {plural(len(loose), 'image')} directly in {shown}: move all into their class folders."
        )
    if empty := [name for name, files in folders.items() if not files]:
        raise UserError(
            f"{where}: {len(empty)} of {len(folders)} class folders in {shown} have no image, such as {empty[0]!r}: "
            "remove them, or add their images."
        )
    return folders


def make_loader(url: str) -> Callable[[str], bytes]:
    """Return a thread-safe function that reads a file by its path in a URL's file system, and raises UserError."""
    fs, _ = filesystem(url)

    def load(path: str) -> bytes:
        with storage_errors(f"{path} cannot be read", "Check that it exists."):
            return bytes(fs.cat_file(path))

    return load


def read_samples(urls: str | Sequence[str], spec: Input, where: str) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a source of any format in order, and the refusals among them.

    A dataset's samples have the true caption as ``txt``, all of them as lines of ``true_captions``, and the metadata as
    ``json``. Raises UserError for a shard that cannot be read completely, since metrics on a part of a set do not
    compare.
    """
    if detect_kind(urls) == "layers":
        assert isinstance(urls, str)
        yield from raise_on_damage(_read_dataset(urls, spec), urls, where)
        return
    check_no_view(urls, spec.view, where)
    for shard in list_shards(urls, spec):
        yield from raise_on_damage(base.read_samples(shard, spec), shard.file, where)


def list_shards(urls: str | Sequence[str], spec: Input) -> list[Shard]:
    """The files of a source that is no reinforced dataset, and each folder of images as one shard. Raises UserError."""
    found = expand(urls)
    format_ = source_format(found, spec.format)
    if not format_.is_listed:
        return [Shard(url, name, format_.name) for url, name in zip(found, shard_names(found), strict=True)]
    lists = {url: b"".join(sample.line() for sample in format_.list_folder(url, spec)[0]) for url in found}
    return [Shard(f"{url.rstrip('/')}/all", format=format_.name, listing=lines) for url, lines in lists.items()]


def input_of(limits: Limits, images_from: Sequence[str] | None, fields: Sequence[str], table: Table) -> Input:
    """How samples are read whose labels or captions are at ``fields``, in the forms of ``read_captions``."""
    captions = [field.removeprefix(LINES) for field in fields if not is_in_json(field)]
    found = Input(captions=captions, images_from=[*images_from] if images_from else None, limits=limits)
    return found.model_copy(update={"format": table.format, "image": table.image, "view": table.view})


def raise_on_damage(items: Iterator[T], url: str, where: str) -> Iterator[T]:
    """Yield the items of a shard. Raises UserError if it cannot be read completely."""
    fix = "Check the path, or download it again."
    with storage_errors(f"{where}: {canonical(url)} cannot be read", fix):
        for item in items:
            if isinstance(item, Refusal) and item.key is None:
                raise UserError(f"{where}: {canonical(url)}: {item.reason.value}: {item.detail}. {fix}")
            yield item


def check_no_view(urls: str | Sequence[str], view: str | None, where: str) -> None:
    """Raise UserError if a view is named of a source that is no reinforced dataset."""
    if view is not None:
        shown = canonical(urls if isinstance(urls, str) else urls[0])
        raise UserError(f"{where}: a view is of one reinforced dataset, and {shown} is none. Remove `view`.")


def _read_dataset(url: str, spec: Input) -> Iterator[RawSample]:
    data = Dataset(url, {}, view=spec.view, images_from=spec.images_from or (), images_key=IMAGES_KEY)
    for sample in data:
        sidecars = {}
        if sample.caption is not None:
            sidecars["txt"] = sample.caption.encode()
            sidecars[TRUE_CAPTIONS] = "\n".join(sample.true_captions).encode()
        if sample.metadata is not None:
            sidecars["json"] = json.dumps(sample.metadata, ensure_ascii=False).encode()
        yield RawSample(sample.key, sample.image, 0, len(sample.image), sidecars)


_BYTES = 16


@dataclass
class ContentDigest:
    """The digest of one pass over a set: of its class names and templates, and of its ``examples``, each hashed."""

    texts: list[Sequence[str]] = field(default_factory=list)
    examples: list[bytes] = field(default_factory=list)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return hash_content(self.texts, b"".join(self.examples)).hex()


def hash_content(value: Any, data: bytes = b"") -> bytes:
    """Hash an example: its target, a JSON value or one with such an attribute ``content``, and its image."""
    text = json.dumps(value, default=attrgetter("content")).encode()
    digest = hashlib.blake2b(text + b"\0", digest_size=_BYTES)
    digest.update(data)
    return digest.digest()


#: uint8 [B, height, width, 3] for each spec, and the targets of the B examples.
_Decoded = tuple[list[np.ndarray], list[Any]]


@dataclass
class CacheBudget:
    """Bytes that are still free for cached images; shared by all sets."""

    free: int


def geometry_of(spec: ImageSpec) -> tuple[object, ...]:
    """Settings that determine the pixels of an image before they are normalised."""
    return spec.height, spec.width, spec.interpolation, spec.resize


class ImageBatches:
    """The images of one set. ``refused`` lists those that could not be decoded in the last complete pass.

    They are cached if ``count`` of them, the number of examples, fit into the ``budget``. ``digest`` receives what is
    read, and ``progress`` the number of images after each batch.
    """

    def __init__(
        self,
        examples: SetReader,
        count: int = 0,
        limits: Limits | None = None,
        budget: CacheBudget | None = None,
        policy: str = IMAGE_POLICY,
        digest: ContentDigest | None = None,
        progress: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.refused: list[Refusal] = []
        self.digest = digest
        self._examples, self._count, self._policy, self._progress = examples, count, policy, progress
        self._limits, self._budget = limits or Limits(), budget or CacheBudget(0)
        self._cached: tuple[object, list[_Decoded], int] | None = None  # geometry, batches, bytes

    def decode(self, specs: Sequence[ImageSpec], size: int, threads: int) -> Iterator[_Decoded]:
        """Yield batches of ``size`` in the set's order: uint8 [B, height, width, 3] by each spec, and targets.

        The last batch may be smaller. Each image is decoded once, in threads, and fitted to each spec; without specs
        it is only loaded. After one complete pass, batches come from the cache if the images fit into the budget, and
        size and geometry are the same.
        """
        geometry = size, [*map(geometry_of, specs)]
        if self._cached is not None:
            known, cached, taken = self._cached
            if known == geometry:
                yield from cached
                return
            self._budget.free += taken
            self._cached = None
        needed = self._count * sum(spec.height * spec.width * 3 for spec in specs)
        kept: list[_Decoded] | None = [] if 0 < needed <= self._budget.free else None
        done = 0

        def convert(item: LabelledImage, data: bytes) -> tuple[list[np.ndarray], Any]:
            if not specs:  # only read
                self._check_size(data)
                return [], item.target
            image = self.open(data)
            return [item.fit(image, spec) for spec in specs], item.target

        with closing(self._converted(convert, 2 * size, threads)) as items:
            while found := list(itertools.islice(items, size)):
                pixels = [np.stack(images) for images in zip(*(images for images, _ in found), strict=True)]
                batch = pixels, [target for _, target in found]
                del found
                if kept is not None:
                    kept.append(batch)
                yield batch
                done += len(batch[1])
                self._progress(done)
        if kept is not None:
            self._budget.free -= needed
            self._cached = geometry, kept, needed

    def whole(
        self, make: Callable[[Image.Image, Any], T], size: int, threads: int, only: Callable[[Any], bool]
    ) -> Iterator[T]:
        """Yield what ``make`` makes of each image, RGB at its own size, and its target, in the set's order.

        ``make`` runs ahead in threads, for ``size`` images. Images whose target is not ``only`` are loaded for the
        digest alone, and not decoded. Nothing is cached.
        """

        def convert(item: LabelledImage, data: bytes) -> T | None:
            return make(self.open(data), item.target) if only(item.target) else None

        skip = None if self.digest is not None else only
        with closing(self._converted(convert, size, threads, skip)) as items:
            found = (item for item in items if item is not None)
            for done, item in enumerate(found, start=1):
                yield item
                self._progress(done)

    def open(self, data: bytes) -> Image.Image:
        """Decode an image to RGB at its own size, as all of this set. Raises ImageRefused. Thread-safe."""
        self._check_size(data)
        return decode(data, self._limits, policy=self._policy)

    def _check_size(self, data: bytes) -> None:
        if len(data) > self._limits.image_bytes:  # a dataset may have been made with wider limits
            raise ImageRefused(Reason.IMAGE_BYTES, f"{len(data)} bytes, above limits.image_bytes")

    def _converted(
        self,
        convert: Callable[[LabelledImage, bytes], T],
        ahead: int,
        threads: int,
        only: Callable[[Any], bool] | None = None,
    ) -> Generator[T, None, None]:
        """What ``convert`` gives for each example, in threads; their hashes go to ``digest``, those it refuses to
        ``refused``. Closing it cancels pending decodes when the consumer stops early."""
        refused: list[Refusal] = []

        def run(item: LabelledImage | Refusal) -> tuple[bytes, T | Refusal]:
            if isinstance(item, Refusal):
                return hash_content(item.reason.value), item
            data = item.load()
            content = hash_content(item.target, data) if self.digest is not None else b""
            try:
                return content, convert(item, data)
            except ImageRefused as error:
                return content, Refusal(item.key, error.reason, error.detail)

        examples = self._examples()
        if only is not None:
            examples = (item for item in examples if isinstance(item, Refusal) or only(item.target))
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
            closing(prefetch(pool, run, examples, ahead + threads)) as found,
        ):
            for content, item in found:
                if self.digest is not None:
                    self.digest.examples.append(content)
                if isinstance(item, Refusal):
                    refused.append(item)
                else:
                    yield item
        self.refused = refused
