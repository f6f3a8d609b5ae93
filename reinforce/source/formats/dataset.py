"""The samples layer of another reinforced dataset as a source: keys, images, captions and metadata."""

from __future__ import annotations

import functools
import glob
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from reinforce.errors import UserError
from reinforce.source.config import Input
from reinforce.source.file_types import MANIFEST
from reinforce.source.formats.base import Columns, Shard, SourceFormat
from reinforce.source.formats.parquet import ParquetFile, Row
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.references import ImageRoots, LostImage, images_or_losses
from reinforce.source.samples import (
    Item,
    RawSample,
    ReadBudget,
    Refusal,
    UnreadSample,
    as_lines,
    make_sample,
    unique_keys,
)
from reinforce.source.urls import (
    Info,
    RowDigests,
    canonical,
    expand,
    filesystem,
    read_whole,
    rows_path,
    shards_path,
    split_view,
)
from schemas import IMAGE_DIGEST, TRUE_CAPTIONS, Reason, image_column

_VIEW_BYTES = 2**30  # of a file of a view
_CHUNK_ROWS = 64  # of referenced images that are read with one file
_TEXTS = {"caption": "txt", "metadata": "json"}  # sidecars that the columns are
_TYPES = {("key", "string"), ("caption", "string"), ("metadata", "string"), ("image", "binary")}
_TYPES |= {("image_ref", "struct<url: string, offset: int64, length: int64>")}


class SamplesLayer(SourceFormat):
    name = "dataset"
    noun = "reinforced dataset"
    has_views = True

    def recognises_folder(self, fs: Any, path: str) -> bool:
        return bool(fs.isfile(f"{path}/{MANIFEST}"))

    def shard_urls(
        self,
        urls: list[str],
        spec: Input,
        read_manifest: Callable[[str], Mapping[str, Any]],
        listed: dict[str, Info] | None = None,
    ) -> list[str]:
        found = []
        for url in urls:
            images = read_manifest(url)["images"]
            if images == "none":
                raise UserError(f"source: {canonical(url)} has labels without images. Name it under `labels`.")
            if images == "reference" and not spec.images_from:
                raise UserError(
                    f"source: {canonical(url)} stores its images by reference. Name the folders with the tars that you "
                    "allow it to read in input.images_from."
                )
            folder = url.rstrip("/")
            literal = folder if "://" in folder else glob.escape(folder)
            found += expand(f"{literal}/samples/*.parquet", listed)
        return found

    def read(self, shard: Shard, spec: Input, budget: ReadBudget | None = None, images: bool = True) -> Iterator[Item]:
        return unique_keys(self.items(shard, spec, images), spec.limits)

    def items(self, shard: Shard, spec: Input, images: bool = True) -> Iterator[Item]:
        """Yield the samples; of a part, those of its row groups."""
        try:
            yield from _read_samples_layer(shard, spec, images)
        except RefusedFile as error:
            yield Refusal(None, Reason.SHARD_UNREADABLE, f"a samples file that cannot be used: {error}")


def _read_samples_layer(shard: Shard, spec: Input, images: bool = True) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a samples file, in order. Raises as ``ParquetFile``, and what the storage raises."""
    url = shard.file
    with ParquetFile(url) as file:
        names = [*file.types]
        image = next((name for name in map(image_column, ("embed", "reference")) if name in names), None)
        types = {name: str(type_).replace(" not null", "") for name, type_ in file.types.items()}
        if image is None or {(name, types.get(name)) for name in ("key", image, *_TEXTS)} - _TYPES:
            raise RefusedFile("it does not have the columns of a samples layer")
        read = (*_TEXTS, *({IMAGE_DIGEST, TRUE_CAPTIONS} & {*names}), *((image,) if images else ()))
        columns = Columns("key", "key", {}, read, tuple(names))
        sizes = file.group_sizes
        start, end = (shard.part.start, shard.part.end) if shard.part else (0, len(sizes))
        rows = file.rows(columns, range(start, end), sum(sizes[:start]))
        if spec.view is not None:
            rows = _kept_rows(rows, url, spec.view)
        if image == image_column("embed") or not images:
            for row in rows:
                if isinstance(row, RefusedFile):
                    yield Refusal(None, Reason.SHARD_DAMAGED, str(row))
                else:
                    yield _sample(row[1], row[1].get(image, b""), spec)
            return
        roots = ImageRoots.named(spec.images_from or (), 'input.images_from: ["{}"]', spec.limits.image_bytes)
        while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
            yield from _referenced([row[1] for row in chunk if not isinstance(row, RefusedFile)], roots, spec)
            for row in chunk:
                if isinstance(row, RefusedFile):
                    yield Refusal(None, Reason.SHARD_DAMAGED, str(row))


def _kept_rows(
    rows: Iterator[tuple[int, Row] | RefusedFile], url: str, view: str
) -> Iterator[tuple[int, Row] | RefusedFile]:
    """The rows of a samples file that a view keeps. Raises RefusedFile if the view is of other rows."""
    dataset, _, file = url.rpartition("/samples/")
    shard = file.removesuffix(".parquet")
    path = rows_path(*split_view(view), shard)
    if not _row_digests(dataset, view).check(shard, _read_small("/".join((dataset, *path)))):
        raise RefusedFile(f"the file of view {view} does not have the digest that the view states")
    with ParquetFile("/".join((dataset, *path))) as rows_of_view:
        columns = Columns("key", "key", {}, ("left_out",), tuple(rows_of_view.types))
        if {*columns.read} - rows_of_view.types.keys():
            raise RefusedFile(f"{path[-2]}/{path[-1]} of view {view} does not have its columns")
        found = rows_of_view.rows(columns)
        for item in rows:
            if isinstance(item, RefusedFile):
                yield item
                continue
            number, row = item
            state = next((one for one in found if isinstance(one, RefusedFile) or one[0] >= number), None)
            if isinstance(state, RefusedFile):
                raise RefusedFile(f"view {view}: {state}")
            if state is None or (state[0], state[1]["key"]) != (number, row["key"]):
                raise RefusedFile(f"view {view} is of other samples; make it again with reinforce select")
            if state[1]["left_out"] is None:
                yield item


@functools.lru_cache(maxsize=8)
def _row_digests(dataset: str, view: str) -> RowDigests:
    """The digests of the rows of a view, which are read once. Raises RefusedFile, and what the storage raises."""
    try:
        return RowDigests.parse(_read_small("/".join((dataset, *shards_path(*split_view(view))))))
    except FileNotFoundError as error:
        raise RefusedFile(f"view {view} has no digests of its rows; make it again with reinforce select") from error
    except pa.ArrowException as error:
        raise RefusedFile(f"view {view}: the digests of its rows cannot be read: {error}") from error


def _read_small(url: str) -> bytes:
    """Read a file of a view. Raises RefusedFile for one above the bounds, and what the storage raises."""
    fs, path = filesystem(url)
    if (fs.info(path).get("size") or 0) > _VIEW_BYTES:
        raise RefusedFile(f"{path.rpartition('/')[2]} of a view has more than {_VIEW_BYTES:,} bytes")
    return read_whole(fs, path)


def _referenced(rows: Sequence[Row], roots: ImageRoots, spec: Input) -> Iterator[RawSample | Refusal]:
    """The samples of rows whose images are in tars; those of one tar are read together."""
    for _, group in itertools.groupby(rows, key=lambda row: row["image_ref"]["url"]):
        part = list(group)
        done = 0
        try:
            ranges = roots.ranges([row["image_ref"] for row in part])
            for image in images_or_losses(ranges, [row.get(IMAGE_DIGEST) for row in part]):
                row, done = part[done], done + 1
                if isinstance(image, LostImage):
                    yield Refusal(row["key"], image.reason, image.detail)
                else:
                    yield _sample(row, image, spec)
        except UserError as error:
            for row in part[done:]:
                yield Refusal(row["key"], Reason.IMAGE_PLACE, str(error))


def _sample(row: Row, image: bytes, spec: Input) -> RawSample | Refusal:
    sidecars = {name: row[column].encode() for column, name in _TEXTS.items() if row[column] is not None}
    if spec.captions_per_sample and (several := as_lines(row.get(TRUE_CAPTIONS))):
        sidecars["txt"] = several.encode()
    return make_sample(UnreadSample(row["key"], "", sidecars, {}, ()), image, spec.limits)


FORMAT = SamplesLayer()
