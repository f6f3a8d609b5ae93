"""What a source format offers: recognising, reading, counting and dividing its files.

A format is one object. All other code reads sources through it, and never asks which format it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reinforce.input_config import DEFAULT, Input, Limits
from reinforce.source.file_types import foreign_name, is_image_name
from reinforce.source.samples import Item, ReadBudget, unique_keys
from reinforce.source.urls import Info, filesystem
from reinforce.source.whole_reads import read_whole


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the table ``file``, a URL: ``rows`` rows from row ``first`` on.

    ``start`` and ``end`` are row groups of Parquet, else bytes of the uncompressed content; the first ``header`` bytes
    have the names of columns.
    """

    file: str
    first: int
    rows: int
    start: int
    end: int
    header: int = 0

    def numbers(self) -> list[int]:
        """The part without its file, for a list."""
        return [self.first, self.rows, self.start, self.end, self.header]


@dataclass(frozen=True)
class Shard:
    """A shard of a source: its URL, its name and the name of its format. Rows without a key get one from the name.

    A shard of a folder has the URL ``FOLDER/<block>``, and ``listing`` is the list of its files: a URL, or the content.
    A shard that is a part of a table has the URL ``TABLE/<part>``, and ``part`` are its rows.
    """

    url: str
    name: str = ""
    format: str = DEFAULT
    listing: str | bytes = ""
    part: Part | None = None

    @property
    def file(self) -> str:
        """The URL of the file that is read; of a folder, that of the shard."""
        return self.part.file if self.part else self.url

    @property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]

    def lines(self) -> list[bytes]:
        """The lines of its list, one for each sample."""
        content = self.listing
        if isinstance(content, str):
            fs, path = filesystem(content)
            content = read_whole(fs, path)
        return content.splitlines()


@dataclass
class ListedSample:
    """The files of one key by extension, each with its path in the folder and its size, and a row of metadata."""

    key: str
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    row: dict[str, Any] | None = None

    def image(self, limits: Limits) -> str:
        """The path of the image that is read, empty if there is none; lists of earlier versions have further ones."""
        found = [extension for extension in [*self.files][: limits.members] if is_image_name(extension)]
        read = next((one for one in found if "." not in one), found[0] if found else None)
        return "" if read is None else self.files[read][0]

    def line(self) -> bytes:
        """The sample as a line of JSON, of a list."""
        return json.dumps({"key": self.key, "files": self.files, "row": self.row}, default=str).encode() + b"\n"


def divided(url: str, rows: int, ends: Iterable[tuple[int, int]], last: Part | None, header: int = 0) -> Iterator[Part]:
    """Yield the parts after ``last`` of a table, of at least ``rows`` rows but the last one.

    ``ends`` are the places, as in ``Part.end``, at which the table can be divided, with the rows before each since the
    one before it.
    """
    first, start = (last.first + last.rows, last.end) if last else (0, header)
    count, end = 0, start
    for more, place in ends:
        if place > start:
            count, end = count + more, place
            if count >= rows:
                yield Part(url, first, count, start, end, header)
                first, start, count = first + count, end, 0
    if count:
        yield Part(url, first, count, start, end, header)


class SourceFormat:
    """One format of sources. The defaults are those of files that hold samples and cannot be divided."""

    #: The name in configs, and the word for one of its files in messages.
    name: str
    noun: str
    #: Endings of the names of its files in lower case, and further ones that are read if a config names the format.
    endings: tuple[str, ...] = ()
    other_endings: tuple[str, ...] = ()
    #: Endings of names that several formats share, whose files are of this one if it recognises their content.
    content_endings: tuple[str, ...] = ()
    #: Whether all files of a source are read as this format if one is by its name.
    prevails: bool = False
    #: Whether each row of a file is a sample, with columns. Such a file can be divided into parts.
    is_table: bool = False
    #: Bytes above which a file is worth several shards.
    whole_bytes: int | None = None
    #: Whether a shard is a list of files of a folder, and no file.
    is_listed: bool = False
    #: Whether ``RawSample.offset`` is the place of the image in the file, from which it can be read again.
    has_offsets: bool = False
    #: Whether images can be stored by reference.
    referable: bool = False
    #: Whether ``input.view`` can choose samples of it.
    has_views: bool = False

    def read(self, shard: Shard, spec: Input, budget: ReadBudget | None = None, images: bool = True) -> Iterator[Item]:
        """Yield the samples of a shard in order, each key once, with refusals in between.

        ``budget`` bounds the bytes that are read before the first sample. Without ``images``, samples may lack theirs,
        where that is less work. Damage is yielded as a Refusal without a key. Raises the errors of the storage.
        """
        return unique_keys(self.items(shard, spec), spec.limits)

    def items(self, shard: Shard, spec: Input) -> Iterator[Item]:
        """Yield the samples of a shard, whose keys may come again, as ``read`` does."""
        raise NotImplementedError

    def recognises(self, head: bytes) -> bool:
        """Whether a file begins with ``head``, its first bytes, in this format alone."""
        return False

    def recognises_folder(self, fs: Any, path: str) -> bool:
        """Whether a folder as a whole is a source of this format. Raises the errors of the storage."""
        return False

    def notes(self, url: str) -> list[str]:
        """Possible misreadings of a file, for the user. Raises the errors of the storage."""
        return []

    def foreign(self, url: str) -> str | None:
        """The type of a file whose name has no format's ending; None if it may have this format."""
        kind = foreign_name(url)
        return None if kind is None else f"{kind.partition(',')[0]}, not a {self.noun}"

    def shard_urls(
        self,
        urls: list[str],
        spec: Input,
        read_manifest: Callable[[str], Mapping[str, Any]],
        listed: dict[str, Info] | None = None,
    ) -> list[str]:
        """The URLs of the shards of the entries of ``source``; ``read_manifest`` reads the manifest of a dataset, and
        ``listed`` is as in ``expand``. Raises UserError.
        """
        return urls

    def count(self, url: str, limits: Limits) -> int | None:
        """Number of samples of a file, or None if it cannot be read. Raises the errors of the storage."""
        keys = {item.key for item in self.read(Shard(url, format=self.name), Input(limits=limits), images=False)}
        return len(keys - {None}) or None

    # Of tables.

    def parts(self, url: str, rows: int, last: Part | None = None) -> Iterator[Part]:
        """Yield the parts of a table of ``rows`` rows, or more where it cannot be divided there, but the last one.

        With ``last``, the parts of the rows after it. Raises RefusedFile, EOFError and csv.Error for damage, and the
        errors of the storage.
        """
        raise NotImplementedError

    def first_row(self, url: str) -> tuple[list[str], Mapping[str, Any]] | None:
        """The binary columns of a table, and a value of each column of its first row; None if it has no row.

        Raises RefusedFile, EOFError, and the errors of the storage.
        """
        raise NotImplementedError

    # Of folders.

    def list_folder(
        self, url: str, spec: Input, output: str = "", listed: Sequence[ListedSample] = ()
    ) -> tuple[list[ListedSample], list[str]]:
        """List a folder with all folders in it, but hidden ones and ``output``, a canonical URL. Raises UserError.

        Returns the samples in the order of their paths, without those that are ``listed`` already, and notes on files
        that are left out.
        """
        raise NotImplementedError
