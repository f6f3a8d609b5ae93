"""Parquet files as they are read: nothing is decoded before its size is known and bounded.

A dataset may be untrusted, and a Parquet file of some kilobytes can ask its decoder for gigabytes: by its footer, by
the headers of its pages, or by a dictionary with one long value. The bounds are those of the reader. The Arrow schema
in the footer is not used, because Arrow would create the types that it names by whatever code has registered them, and
types of some libraries unpickle their values. The columns have the types of ``schemas``. Checksums of pages are
verified where a file has them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import math
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import schemas
from reinforce.dataset import vectors
from reinforce.dataset.codecs.codebooks import Place
from reinforce.dataset.kinds.registry import KINDS
from reinforce.errors import UserError
from reinforce.source.parquet_file import (
    DICTIONARY,
    BadPage,
    FooterCheck,
    RefusedFile,
    WindowFile,
    longest_entry,
    read_pages,
    span,
)
from reinforce.terminal import escape

#: Bounds of a file. A run writes at most 1,024 rows and 32 MiB of images in a row group.
MAX_ROWS = 2**14  # of a row group
MAX_VALUES = 2**20  # of a column of texts or structs in a row group
MAX_BYTES = 2**30  # of the columns of a row group that are read together

_KEYS = "key"
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


@contextlib.contextmanager
def naming_refused(file: tuple[str, str] | None) -> Iterator[None]:
    """Give a RefusedFile the layer and shard of its file."""
    try:
        yield
    except RefusedFile as error:
        error.file = error.file or file
        raise


@contextlib.contextmanager
def row_errors(where: str) -> Iterator[None]:
    """Turn what the conversion of damaged or forged rows raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, pa.ArrowException) as error:
        raise UserError(
            f"{where}: rows are not as runs write them ({escape(f'{type(error).__name__}: {error}'[:300])}). Restore "
            "the dataset."
        ) from error


def _shape_of(type_: pa.DataType) -> str:
    """A type as text, without the names of list elements and without what files may leave out."""
    if isinstance(type_, pa.FixedShapeTensorType):
        return f"list<{type_.value_type}>"
    if pa.types.is_list(type_):
        return f"list<{_shape_of(type_.value_type)}>"
    if pa.types.is_struct(type_):
        fields = (type_.field(i) for i in range(type_.num_fields))
        return f"struct<{', '.join(f'{field.name}: {_shape_of(field.type)}' for field in fields)}>"
    return str(type_)


#: The axes of each column whose rows have a shape, and those that no reader converts to float32 as a whole.
_TENSORS = {name: axes for kind in KINDS.values() for name, axes in kind.tensors.items()}
_KEPT_AS_STORED = {name for kind in KINDS.values() for name in kind.kept_as_stored}
_NOT_IN_ALL = {schemas.TRUE_CAPTIONS, schemas.LABELLED}  # not in all files of samples
_accepted_schemas: deque[pa.Schema] = deque(maxlen=4)  # the last ones, because files of a layer have the same


def check_rows(rows: int, most: int = MAX_ROWS) -> int:
    """Return the number of rows of a row group. Raises RefusedFile if it is above the bounds."""
    if not 0 <= rows <= most:
        raise RefusedFile(f"a row group has {rows:,} rows; at most {most:,} are read")
    return rows


@dataclass(frozen=True)
class StoredKeys:
    """The column of keys of a row group as it is stored: equal bytes that are decoded alike are equal keys."""

    rows: int
    form: tuple[object, ...]
    chunk: bytes


class LayerFile:
    """An open Parquet file whose row groups are checked before they are decoded.

    ``source`` is an open binary file of ``size`` bytes, which the caller closes, and ``file`` the layer and shard that
    errors name. ``dataset`` is the URL of its dataset, where codebooks are. Raises RefusedFile, and what the storage
    raises.
    """

    def __init__(
        self,
        source: Any,
        size: int,
        max_rows: int = MAX_ROWS,
        file: tuple[str, str] | None = None,
        dataset: str | None = None,
    ) -> None:
        self._dataset = dataset
        self._source, self._max_rows, self._name = WindowFile(source, size), max_rows, file
        self.metadata, content = self._source.footer()
        self._readable = source if isinstance(source, pa.NativeFile) else None
        self.num_row_groups: int = self.metadata.num_row_groups
        self._names = _column_names(self.metadata)
        #: The footer, its columns and its bytes, for ``check_together``.
        self.footer: tuple[pq.FileMetaData, Sequence[str], bytes] = (self.metadata, self._names, content)
        self._check: FooterCheck | None = None

    @functools.cached_property
    def _file(self) -> pq.ParquetFile:
        readable = pa.PythonFile(self._source, mode="r") if self._readable is None else self._readable
        return pq.ParquetFile(readable, metadata=self.metadata, page_checksum_verification=True, pre_buffer=False)

    @functools.cached_property
    def _shapes(self) -> dict[str, list[int]]:
        """The shapes of tensors in the Arrow schema of the footer: only the numbers are read."""
        try:
            schema = base64.b64decode((self.metadata.metadata or {}).get(b"ARROW:unused", b""))
        except ValueError:
            return {}
        found = re.findall(rb'\{"shape":\[(\d{1,9}(?:,\d{1,9})?)\]', schema)
        shapes = sorted(([int(side) for side in shape.split(b",")] for shape in found), key=len, reverse=True)
        if not shapes or len(shapes[0]) != 2:
            return {}
        return {name: shapes[0][:axes] for name, axes in _TENSORS.items()}

    @functools.cached_property
    def _paths(self) -> list[str]:
        """The path of each column chunk of a row group, by the schema."""
        schema = self.metadata.schema
        return [str(schema.column(place).path) for place in range(len(schema))]

    def _leaves(self, group: pq.RowGroupMetaData, names: Collection[str]) -> list[Any]:
        """The column chunks of some columns. Raises RefusedFile if they have other names than in the schema."""
        try:
            places = [place for place, path in enumerate(self._paths) if path.partition(".")[0] in names]
            leaves = [group.column(place) for place in places]
            same = [leaf.path_in_schema for leaf in leaves] == [self._paths[place] for place in places]
        except (UnicodeDecodeError, IndexError) as error:
            raise RefusedFile(f"its footer cannot be used: {error}") from error
        if not same:
            raise RefusedFile("its footer names the columns of a row group otherwise than those of the file")
        return leaves

    def read(self, columns: Collection[str] | None = None) -> pa.Table:
        """Read all row groups; raises as ``read_row_group``."""
        if not self.num_row_groups:
            return self._file.schema_arrow.empty_table()
        return pa.concat_tables([self.read_row_group(number, columns) for number in range(self.num_row_groups)])

    def read_row_group(self, number: int, columns: Collection[str] | None = None) -> pa.Table:
        """Read a row group, or some of its columns. Raises RefusedFile if it is above the bounds or damaged.

        This thread reads and decodes alone, as in ``reinforce.source.parquet_file.read_table``.
        """
        names = [name for name in self._names if columns is None or name in columns]
        with naming_refused(self._name):
            if missing := set(columns or ()) - set(names) - {schemas.TRUE_CAPTIONS}:
                raise RefusedFile(f"it has no column {', '.join(sorted(missing))}")
            group = self._row_group(number)
            leaves = self._leaves(group, names)
            self._source.fetch([span(leaf, self._source.size()) for leaf in leaves])
            try:
                with self._decode_errors():
                    self._check_bytes(group.num_rows, leaves)
                    table = self._file.read_row_group(number, columns=names, use_threads=False)
            finally:
                self._source.fetch([])
            return self._with_tensors(table)

    def has_nulls(self, number: int, column: str) -> bool:
        """Whether rows of a tensor may be null, by the footer alone, in which a null row has one value."""
        with naming_refused(self._name):
            group = self._row_group(number)
            sides, [leaf] = self._shapes.get(column, []), self._leaves(group, [column])
            return math.prod(sides) < 2 or leaf.num_values != group.num_rows * math.prod(sides)

    def stored_keys(self, number: int, most_bytes: int) -> StoredKeys | None:
        """The keys of a row group without decoding them; None if they take more than ``most_bytes``.

        Raises RefusedFile as ``read_row_group``, but damage is found only by comparing the result with another one.
        """
        with naming_refused(self._name):
            group = self._row_group(number)
            if _KEYS not in self._paths:
                raise RefusedFile(f"it has no column {_KEYS}")
            [leaf], column = self._leaves(group, [_KEYS]), self.metadata.schema.column(self._paths.index(_KEYS))
            start, length = span(leaf, self._source.size())
            if length > most_bytes:
                return None
            form = (
                leaf.physical_type, str(column.logical_type), column.max_definition_level, leaf.num_values,
                leaf.compression, leaf.total_uncompressed_size, leaf.data_page_offset - start,
            )  # fmt: skip
            self._source.fetch([(start, length)])  # they are often decoded next
            return StoredKeys(group.num_rows, form, bytes(self._source.read_at(start, length)))

    def content(self, columns: Collection[str] | None = None) -> bytes:
        """Digest of all row groups of some columns, without decoding them: of the checksums of their pages.

        Of pages without checksums their bytes are used. Raises RefusedFile.
        """
        digest = hashlib.blake2b(digest_size=8)
        with naming_refused(self._name):
            for number in range(self.num_row_groups):
                group = self._row_group(number)
                leaves = {place: group.column(place) for place in range(group.num_columns)}
                leaves = {n: leaf for n, leaf in leaves.items() if columns is None or _column(leaf) in columns}
                self._source.fetch([span(leaf, self._source.size()) for leaf in leaves.values()])
                for place, leaf in leaves.items():
                    column, (start, length) = self.metadata.schema.column(place), span(leaf, self._source.size())
                    chunk = self._source.read_at(start, length)
                    form = (leaf.path_in_schema, leaf.physical_type, str(column.logical_type))
                    shape = self._shapes.get(_column(leaf))
                    digest.update(repr((*form, column.max_definition_level, leaf.num_values, shape)).encode())
                    with self._decode_errors():
                        for page in read_pages(chunk, leaf.num_values):
                            entry = (page.type, page.values, page.encoding, page.stored, page.checksum)
                            digest.update(repr(entry).encode())
                            if page.checksum is None:
                                digest.update(chunk[page.start : page.start + page.stored])
            self._source.fetch([])
        return digest.digest()

    @contextlib.contextmanager
    def _decode_errors(self) -> Iterator[None]:
        """Turn what Arrow raises for damage into RefusedFile, and raise what the storage has raised as it is."""
        try:
            yield
        except MemoryError:
            raise
        except (BadPage, pa.ArrowException, OSError) as error:
            if self._source.error is not None:
                raise self._source.error from None
            if "CRC checksum" in str(error):
                raise RefusedFile("a page does not have its checksum: bytes of it have changed") from error
            raise RefusedFile(f"a page cannot be decoded: {str(error)[:300]}") from error

    def _row_group(self, number: int) -> pq.RowGroupMetaData:
        """Metadata of a row group in the footer, after Arrow has accepted it."""
        self._check = self._check or FooterCheck(*self.footer)
        self._check.check(number)
        if number >= self.num_row_groups:
            raise RefusedFile(f"it has {self.num_row_groups:,} row groups, and no row group {number}")
        group = self.metadata.row_group(number)
        check_rows(group.num_rows, self._max_rows)
        return group

    def _check_bytes(self, rows: int, leaves: Sequence[Any]) -> None:
        """Raise RefusedFile if column chunks, decompressed and decoded, may need more than the bounds, by the headers
        of their pages."""
        total = 0
        for leaf in leaves:
            name, values = _column(leaf), leaf.num_values
            most = MAX_BYTES if name in _TENSORS else MAX_VALUES
            if not rows <= values <= (most if "." in leaf.path_in_schema else rows):
                raise RefusedFile(f"column {name} has {values:,} values in {rows:,} rows")
            start, length = span(leaf, self._source.size())
            chunk = self._source.read_at(start, length)
            pages = list(read_pages(chunk, values))
            total += sum(page.uncompressed for page in pages)
            if leaf.physical_type == "BYTE_ARRAY":
                for page in (page for page in pages if page.type == DICTIONARY):  # entries of it as all texts
                    longest = page.uncompressed
                    if values * longest > MAX_BYTES // 16:
                        if page.uncompressed > MAX_BYTES:
                            raise RefusedFile("a dictionary is above the bounds")
                        longest = longest_entry(page, chunk[page.start : page.start + page.stored], leaf.compression)
                    total += values * longest
            else:
                total += values * _WIDTHS.get(leaf.physical_type, 2 if name in _KEPT_AS_STORED else 8)
            if name in self._shapes and name not in _KEPT_AS_STORED:
                total += rows * math.prod(self._shapes[name]) * _WIDTHS["FLOAT"]
            if total > MAX_BYTES:
                raise RefusedFile(f"a row group needs more than {MAX_BYTES:,} bytes, in column {name}")

    def _with_tensors(self, table: pa.Table) -> pa.Table:
        """The table with lists of numbers as tensors of the shape that the footer states, if the rows have it, and with
        the place of the codebook that decodes it."""
        for name in _TENSORS:
            if name in table.column_names:
                if name not in self._shapes:
                    raise RefusedFile(f"its schema has no shape of column {name}")
                index = table.column_names.index(name)
                try:
                    tensors = vectors.from_lists(table[name], self._shapes[name])
                except ValueError as error:
                    raise RefusedFile(f"column {name}: {error}") from error
                table = table.set_column(index, name, tensors)
        digest = (self.metadata.metadata or {}).get(b"reinforce.codebook", b"")
        types = [type_.value_type for type_ in table.schema.types if isinstance(type_, pa.FixedShapeTensorType)]
        if not digest and pa.uint8() not in types:
            return table.replace_schema_metadata(None)
        if not re.fullmatch(rb"[0-9a-f]{32}", digest):
            raise RefusedFile("its footer does not name the codebook of its codes")
        place = None if self._name is None else Place(self._dataset or "", self._name[0], digest.decode())
        return table.replace_schema_metadata(place and place.metadata())


def _column_names(footer: pq.FileMetaData) -> list[str]:
    """The columns of a file. Raises RefusedFile if they are not among those of one of ``schemas``."""
    try:
        found = footer.schema.to_arrow_schema()
        names = [str(name) for name in found.names]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise RefusedFile(f"its schema cannot be read: {error}") from error
    version = (footer.metadata or {}).get(b"reinforce.schema_version", b"")
    newer = bool(re.fullmatch(rb"\d{1,9}", version)) and int(version) > schemas.SCHEMA_VERSION
    if not newer and any(found.equals(known) for known in tuple(_accepted_schemas)):  # other threads append
        return names
    if len({*names}) < len(names):
        raise RefusedFile("two of its columns have one name")
    _check_columns(found, newer)
    if not newer:
        _accepted_schemas.append(found)
    return names


def _check_columns(found: pa.Schema, newer: bool) -> None:
    """Raise RefusedFile unless columns belong to one of the known schemas, int8 vectors with their scales, and
    references with their digests.

    Of a ``newer`` version, only the types of known columns are checked.
    """
    known_schemas = [schema for kind in KINDS.values() for schema in kind.file_schemas]
    known_schemas += [schemas.VIEW_SCHEMA, schemas.IDENTITIES_SCHEMA, schemas.QUARANTINE_SCHEMA]
    layouts = [{field.name: _shape_of(field.type) for field in one} for one in (*known_schemas, schemas.INDEX_SCHEMA)]
    layouts = [one for place, one in enumerate(layouts) if one not in layouts[:place]]  # kinds share some
    of_any_fields = _shape_of(pa.struct([]))
    shapes = {field.name: _shape_of(field.type) for field in found}
    for name in shapes:
        if pa.types.is_struct(found.field(name).type) and any(one.get(name) == of_any_fields for one in layouts):
            shapes[name] = of_any_fields
    unknown = {name for name in shapes if not any(name in layout for layout in layouts)}
    known = {name: shape for name, shape in shapes.items() if name not in unknown}
    for name, shape in known.items():
        if not any(layout.get(name) == shape for layout in layouts):
            raise RefusedFile(f"column {name} has type {str(found.field(name).type)[:200]}")
    if newer:
        return
    fitting = [layout for layout in layouts if known.items() <= layout.items()]
    if not fitting:
        raise RefusedFile(f"its columns do not belong together: {', '.join(shapes)}")
    missing = [layout.keys() - known.keys() - _NOT_IN_ALL for layout in fitting]
    of_unknown = [names for names in missing if len(names) == len(unknown)]
    if unknown and len(of_unknown) != 1:
        raise RefusedFile(f"it has a column {escape(min(unknown)[:100])}, which no layer has")
    if unknown or missing in ([{"scales"}], [{schemas.IMAGE_DIGEST}]):
        raise RefusedFile(f"it has no column {', '.join(sorted(of_unknown[0] if unknown else missing[0]))}")


def _column(leaf: Any) -> str:
    return str(leaf.path_in_schema).partition(".")[0]
