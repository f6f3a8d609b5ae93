"""csv and tsv, plain or compressed, in the encoding and with the delimiter that the file shows.

The first line has the names of the columns.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reinforce.source.file_types import is_image_name
from reinforce.source.formats.base import IMAGES, PLACES, Part
from reinforce.source.formats.jsonl import (
    COMPRESSIONS,
    BrokenRow,
    LinesFormat,
    Row,
    file_head,
    file_lines,
    too_long,
)
from reinforce.source.samples import REPLACED
from reinforce.source.urls import canonical

_ROW_BYTES = 2**20
_HEAD_BYTES = 2**18
_DELIMITERS = (",", ";", "\t", "|")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHAOS = 0.1  # in which encodings may differ, as charset_normalizer measures it, to be about as likely
_RUSSIAN = frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя")
_ACCENTED = re.compile("[\u00c0-\u024f]")
_MIXED = re.compile(r"[a-z][а-яё]|[а-яё][a-z]", re.IGNORECASE)  # words of two scripts
_CAPTION_NUMBER = re.compile(r"#\d+$")  # of Flickr's image names in captions.token

csv.field_size_limit(max(_ROW_BYTES, csv.field_size_limit()))  # which would end a row inside its cell


class Csv(LinesFormat):
    name = "csv"
    noun = "csv file"
    line = "a row"
    has_header = True
    endings = tuple(f".{name}{end}" for name in ("csv", "tsv") for end in ("", *(f".{end}" for end in COMPRESSIONS)))
    whole_bytes = 2**24  # it names images, and holds none
    referable = True

    def recognises(self, head: bytes) -> bool:
        dialect = _find_dialect(head)
        cells = _cells(head, dialect.encoding, dialect.delimiter)
        return len(cells) > 1 and (_names_images(cells) or _is_image_file(cells[0].strip()))

    def notes(self, url: str) -> list[str]:
        head, shown = file_head(url, _HEAD_BYTES), canonical(url)
        dialect = _find_dialect(head, url)
        if not dialect.guessed:
            return []
        notes = [f"source: {shown} is not UTF-8 and is read as {dialect.encoding}; if that is wrong, store it as UTF-8"]
        if count := codecs.getincrementaldecoder(dialect.encoding)("replace").decode(head).count(REPLACED):
            notes.append(
                f"source: {shown} has {count:,} characters in its first {len(head):,} bytes that become U+FFFD"
            )
        return notes

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        names: list[str] | None = None
        number = part.first if part else 0
        for line, values, _ in _records(url, part):
            if isinstance(values, Exception):
                yield number, BrokenRow(f"line {line}: {values}", isinstance(values, BrokenRow))
                if names is None:  # without the names of the columns, no row can be read
                    return
                number += 1
            elif names is None:
                names = [name.strip() for name in values]
                if fault := _header_fault(names):
                    yield number, BrokenRow(f"line 1: {fault}")
                    return
            elif values:
                row: Row | BrokenRow = dict(itertools.zip_longest(names, values[: len(names)]))
                if any(values[len(names) :]):
                    what = f"{len(values)} values for {len(names)} columns: quote texts with the delimiter"
                    row = BrokenRow(f"line {line}: {what}")
                yield number, row
                number += 1

    def ends(self, url: str) -> Iterator[int]:
        named = False
        for _, values, position in _records(url):
            if isinstance(values, Exception) and not named:
                return
            if values or not named:
                named = True
                yield position


def _records(url: str, part: Part | None = None) -> Iterator[tuple[int, list[str] | Exception, int]]:
    """Yield the number of the first line of each record, its values or what is wrong with it, and where it ends."""
    dialect = _find_dialect(file_head(url, _HEAD_BYTES), url)
    texts = _Texts(url, dialect, part)
    reader = csv.reader(texts, delimiter=dialect.delimiter, skipinitialspace=dialect.spaced, strict=True)
    values: list[str] | Exception | None
    while True:
        line = reader.line_num + texts.skipped + 1
        texts.row_bytes = 0
        try:
            values = next(reader, None)
        except (csv.Error, BrokenRow) as error:
            values = error
        if values is None:
            return
        yield line, values, texts.position


class _Texts:
    """The lines of a file as texts. Raises BrokenRow for a row that is too long; the next call returns the line after
    its end, which is not the end of a line inside of quotes.

    ``row_bytes`` are those of the row that is read, which 0 begins anew. ``position`` is the end of the last line, in
    bytes of the uncompressed file; of UTF-16, in those of its UTF-8. ``skipped`` are the lines that ``csv.reader`` has
    not counted.
    """

    def __init__(self, url: str, dialect: _Dialect, part: Part | None = None) -> None:
        is_wide = dialect.encoding.startswith("utf-16")  # bytes of line ends are also parts of other characters
        self._encoding = "utf-8" if is_wide else dialect.encoding
        self._cells = _CellState(dialect)
        self._lines = file_lines(url, _ROW_BYTES, part, dialect.encoding if is_wide else None, self._cells.feed)
        self.row_bytes = self.position = self.skipped = 0

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        line = self._read()
        if line is not None and self.row_bytes <= _ROW_BYTES:
            encoding, self._encoding = self._encoding, self._encoding.removesuffix("-sig")
            return line.decode(encoding, "replace") + "\n"
        while True:  # up to the end of the row
            self.skipped += 1
            if line is not None:
                self._cells.feed(line)
            if self._cells.state != "quoted":
                raise too_long(_ROW_BYTES, "row")
            try:
                line = self._read()
            except StopIteration:
                raise BrokenRow(f"a row of {self.row_bytes:,} bytes: one of its quotes has no end", True) from None

    def _read(self) -> bytes | None:
        """The next line of the row, or None if it is too long; then its bytes have changed the state of the cells."""
        self._cells.state = "quoted" if self.row_bytes else "start"  # csv.reader reads on inside of quotes alone
        line, size = next(self._lines)
        self.position += size
        self.row_bytes += size
        return line


class _CellState:
    """The ``state`` at the end of what was fed of a row, such as "quoted", by the rules of ``csv.reader``."""

    def __init__(self, dialect: _Dialect) -> None:
        self._delimiter = dialect.delimiter.encode()
        spaces = rb" *" if dialect.spaced else b""
        self._spaces = re.compile(spaces)
        self._token = re.compile(rb'"|%b|[^"%b]+' % ((re.escape(self._delimiter),) * 2))
        self.state = "start"

    def feed(self, data: bytes) -> None:
        """Follow a part of a line."""
        for match in self._token.finditer(data):
            token = match[0]
            if self.state == "quoted":
                self.state = "quote in quotes" if token == b'"' else "quoted"
            elif self.state == "quote in quotes":
                self.state = {b'"': "quoted", self._delimiter: "start"}.get(token, "broken")
            elif token == self._delimiter:
                self.state = "start" if self.state != "broken" else "broken"
            elif self.state == "start" and not self._spaces.fullmatch(token):
                self.state = "quoted" if token == b'"' else "text"


@dataclass(frozen=True)
class _Dialect:
    """``spaced`` is whether a space follows each delimiter, ``guessed`` whether only the text shows the encoding."""

    encoding: str = "utf-8"
    guessed: bool = False
    delimiter: str = ","
    spaced: bool = False


def _find_dialect(head: bytes, url: str | None = None) -> _Dialect:
    """The dialect of a file that begins with ``head``; its name, if that is known, has a usual delimiter."""
    encoding, guessed = _encoding(head)
    delimiter = "\t" if url is not None and ".tsv" in canonical(url).rpartition("/")[2].lower() else ","
    found = {one: _cells(head, encoding, one) for one in dict.fromkeys((delimiter, *_DELIMITERS))}
    named = next((one for one, cells in found.items() if _names_images(cells)), None)
    if named is None:
        named = delimiter if len(found[delimiter]) > 1 else max(found, key=lambda one: len(found[one]))
    cells = found[named][1:]
    return _Dialect(encoding, guessed, named, bool(cells) and all(cell.startswith(" ") for cell in cells))


def _header_fault(names: Sequence[str]) -> str | None:
    """Why the first line cannot be the names of columns, or None."""
    if place := next((name for name in names if "://" in name or _is_image_file(name)), None):
        numbers = " and remove #0 and other numbers of captions" if _CAPTION_NUMBER.search(place) else ""
        return (
            f"the first line has {place[:100]!r}, so it is a sample and no names of columns: put a line such as "
            f"`file_name,text` before it{numbers}"
        )
    name, count = next(iter(Counter(filter(None, names)).most_common(1)), ("", 0))
    return f"{count} columns have the name {name[:100]!r}: rename the others" if count > 1 else None


def _encoding(head: bytes) -> tuple[str, bool]:
    """The encoding, and whether it is a guess."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, False
    if 0 in head[:2]:  # the first character is ASCII
        return ("utf-16-be" if head[0] == 0 else "utf-16-le"), False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut off
        return "utf-8", False
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

    matches = from_bytes(head)
    found = matches.best()
    if found is None:
        return "utf-8", True
    names = [found.encoding]
    # What most such files are is taken if it is about as likely: a few letters do not tell encodings apart.
    alike = [one for one in matches if one.chaos <= found.chaos + _CHAOS and one.coherence >= found.coherence]
    if any("cp1252" in one.could_be_from_charset for one in alike):
        names = ["cp1252", *names]
    elif (found.encoding == "cp1125" or _ACCENTED.search(str(found))) and _is_russian(head.decode("cp1251", "replace")):
        names = ["cp1251", *names]
    for name in names:
        if "a,\n".encode(name) == b"a,\n":  # lines are divided before they are decoded
            return name, True
    return "utf-8", True


def _is_russian(text: str) -> bool:
    """Whether the letters that are not ASCII are words of Russian, mostly of small letters."""
    letters = [letter for letter in text if letter > "\x7f" and letter.isalpha()]
    small = sum(letter in _RUSSIAN for letter in letters)
    return small > len(letters) / 2 and all(one.lower() in _RUSSIAN for one in letters) and not _MIXED.search(text)


def _cells(head: bytes, encoding: str, delimiter: str) -> list[str]:
    """The cells of the first line; none where it has no end of a quote."""
    line = head.decode(encoding, "replace").partition("\n")[0].rstrip("\r")
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _names_images(cells: Sequence[str]) -> bool:
    return any(cell.strip().lower() in (*IMAGES, *PLACES) for cell in cells)


def _is_image_file(name: str) -> bool:
    file = _CAPTION_NUMBER.sub("", name)
    return "." in file and is_image_name(file)


FORMAT = Csv()
