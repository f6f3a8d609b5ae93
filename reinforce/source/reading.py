"""Read source shards of every format as streams of samples and refusals."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from reinforce.config import Input, Limits
from reinforce.parquet.footers import RefusedFile
from reinforce.source.file_types import CSV, DATASET, FOLDER, JSONL, PARQUET, TAR
from reinforce.source.formats import lines, parquet
from reinforce.source.formats.columns import Columns, NoColumn, Place, RowReader, find_columns
from reinforce.source.formats.dataset import read_samples_layer
from reinforce.source.formats.folder import read_list
from reinforce.source.formats.parts import Part, group_sizes
from reinforce.source.formats.tar import read_shard
from reinforce.source.linked_images.places import Places
from reinforce.source.samples import RawSample, ReadBudget, Refusal, refused_key, refused_rest, refusing_absent
from reinforce.source.urls import filesystem
from schemas import Reason

_Item = RawSample | Place | Refusal


@dataclass(frozen=True)
class Shard:
    """A shard of a source: its URL, its name, of which keys are made where rows have none, and its format.

    A shard of a folder has the URL ``FOLDER/<block>``, and ``listing`` is the list of its files: a URL, or the content.
    A shard that is a part of a table has the URL ``TABLE/<part>``, and ``part`` says which rows it has.
    """

    url: str
    name: str = ""
    format: str = TAR
    listing: str | bytes = ""
    part: Part | None = None

    @property
    def file(self) -> str:
        """The URL of the file that is read; of a folder, that of the shard."""
        return self.part.file if self.part else self.url

    @property
    def folder(self) -> str:
        """The folder that the shard is in."""
        return self.file.rpartition("/")[0]


def read_samples(shard: Shard, spec: Input, budget: ReadBudget | None = None) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a shard in order, with refusals in between, as ``read_shard`` does for tars.

    In tables each row is a sample; a key that occurs again is refused. ``budget`` bounds what is read of a tar; of the
    other formats little is read before the first sample.
    """
    if shard.format == TAR:
        yield from read_shard(shard.url, spec.limits, budget=budget)
        return
    samples = _unique(_READERS[shard.format](shard, spec), spec.limits)
    yield from refusing_absent(shard.file, _with_images(samples, shard.file, spec))


def _with_images(items: Iterator[_Item], table: str, spec: Input) -> Iterator[RawSample | Refusal]:
    """The items, with the images of those that are in files of their own."""
    for item in items:
        if isinstance(item, Place):
            yield from Places(table, spec).samples(itertools.chain([item], items))
            return
        yield item


def _unique(items: Iterator[_Item], limits: Limits) -> Iterator[_Item]:
    """Refuse keys that are too long or occur again, and end after ``limits.shard_samples`` rows."""
    seen: set[bytes] = set()
    for number, item in enumerate(items):
        if number == limits.shard_samples:
            yield refused_rest(limits, f"row {number:,}")
            return
        if isinstance(item, Refusal):
            yield item
            continue
        digest = hashlib.blake2b(item.key.encode("utf-8", "replace"), digest_size=8).digest()
        if refusal := refused_key(item.key, limits, digest in seen):
            yield refusal
        else:
            seen.add(digest)
            yield item


def _read_parquet(shard: Shard, spec: Input) -> Iterator[_Item]:
    reader = RowReader(shard.name, spec)
    try:
        with parquet.ParquetFile(shard.file) as file:
            types = file.types
            plain = [name for name, type_ in types.items() if not parquet.is_binary(type_)]
            columns = find_columns([*types], spec, plain)
            parquet.check_image_column(columns, types)
            for item in file.rows(columns, *_row_groups(file, shard.part)):
                if isinstance(item, RefusedFile):
                    yield Refusal(None, Reason.SHARD_DAMAGED, str(item))
                else:
                    yield reader.sample(*item, columns)
    except (RefusedFile, NoColumn) as error:
        yield Refusal(None, Reason.SHARD_UNREADABLE, f"a Parquet file that cannot be used: {error}")


def _row_groups(file: parquet.ParquetFile, part: Part | None) -> tuple[range | None, int]:
    """The row groups that are read, and the number of their first row. Raises RefusedFile if the part is not there."""
    if part is None:
        return None, 0
    if not part.follows(group_sizes(file.footer)):
        raise RefusedFile("it has other row groups than when its shards were formed")
    return range(part.start, part.end), part.first


def _read_jsonl(shard: Shard, spec: Input) -> Iterator[_Item]:
    limits = spec.limits
    most = limits.image_bytes * 4 // 3 + 4 * limits.sidecar_bytes + 2**16
    yield from _read_lines(shard, spec, lambda: lines.jsonl_rows(shard.file, most, _span(shard)), "a JSON object")


def _read_csv(shard: Shard, spec: Input) -> Iterator[_Item]:
    yield from _read_lines(shard, spec, lambda: lines.csv_rows(shard.file, _span(shard)), "a row")


def _span(shard: Shard) -> lines.Span | None:
    return shard.part.span if shard.part else None


def _read_lines(
    shard: Shard, spec: Input, rows: Callable[[], Iterator[tuple[int, lines.Row | lines.BrokenRow]]], what: str
) -> Iterator[_Item]:
    """The samples of rows without a schema: each row is read by the columns that it has."""
    reader, known = RowReader(shard.name, spec), _KnownColumns(spec)
    good = bad = 0
    try:
        for number, row in rows():
            key = f"{shard.name}-{number:08d}"
            try:
                if isinstance(row, lines.BrokenRow):
                    raise row
                item = reader.sample(number, row, known.columns([*row]))
                good += 1
            except lines.BrokenRow as error:
                bad += 1
                item = Refusal(key, Reason.IMAGE_BYTES if error.too_long else Reason.ROW_BROKEN, str(error))
            except NoColumn as error:
                item = Refusal(key, Reason.NO_IMAGE, str(error))
                bad += 1
            yield item
    except EOFError as error:
        detail = str(error).replace(" .tar.", " .")  # what to name a compressed file
        yield Refusal(None, Reason.SHARD_DAMAGED if good else Reason.SHARD_UNREADABLE, detail)
        return
    if shard.part and good + bad != shard.part.rows:
        detail = f"{good + bad:,} rows where {shard.part.rows:,} were when its shards were formed"
        yield Refusal(None, Reason.SHARD_DAMAGED, detail)
    if bad and not good:
        yield Refusal(None, Reason.SHARD_UNREADABLE, f"no line is {what} with an image; {item.detail}")  # type: ignore[union-attr]


class _KnownColumns:
    """The columns of rows by their names, found once for rows with equal names."""

    def __init__(self, spec: Input) -> None:
        self._spec = spec
        self._last: tuple[Sequence[str], Columns] | None = None

    def columns(self, names: Sequence[str]) -> Columns:
        """Raises NoColumn."""
        if self._last is None or self._last[0] != names:
            self._last = names, find_columns(names, self._spec)
        return self._last[1]


def _read_folder(shard: Shard, spec: Input) -> Iterator[_Item]:
    yield from read_list(read_listing(shard), shard.folder, spec)


def read_listing(shard: Shard) -> list[bytes]:
    """The lines of the list of a shard of a folder, one for each sample."""
    content = shard.listing
    if isinstance(content, str):
        fs, path = filesystem(content)
        content = fs.cat_file(path)
    return content.splitlines()


def _read_dataset(shard: Shard, spec: Input) -> Iterator[_Item]:
    try:
        yield from read_samples_layer(shard.url, spec)
    except RefusedFile as error:
        yield Refusal(None, Reason.SHARD_UNREADABLE, f"a samples file that cannot be used: {error}")


_READERS: dict[str, Callable[[Shard, Input], Iterator[_Item]]] = {
    PARQUET: _read_parquet,
    JSONL: _read_jsonl,
    CSV: _read_csv,
    DATASET: _read_dataset,
    FOLDER: _read_folder,
}
