"""The dialect of a csv file, by its first bytes: encoding, delimiter, and whether its first line names columns."""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from reinforce.source.file_types import is_image_name
from reinforce.source.formats.columns import IMAGES, PLACES

HEAD_BYTES = 2**18
_DELIMITERS = (",", ";", "\t", "|")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHAOS = 0.1  # in which encodings may differ, as charset_normalizer measures it, to be about as likely
_RUSSIAN = frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя")
_ACCENTED = re.compile("[\u00c0-\u024f]")
_MIXED = re.compile(r"[a-z][а-яё]|[а-яё][a-z]", re.IGNORECASE)  # words of two scripts
_CAPTION_NUMBER = re.compile(r"#\d+$")  # of Flickr's image names in captions.token


@dataclass(frozen=True)
class Dialect:
    """``spaced`` is whether a space follows each delimiter, ``guessed`` whether only the text shows the encoding."""

    encoding: str = "utf-8"
    guessed: bool = False
    delimiter: str = ","
    spaced: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether bytes of line ends are also parts of other characters."""
        return self.encoding.startswith("utf-16")


def find_dialect(head: bytes, delimiter: str = ",") -> Dialect:
    """The dialect of a file that begins with ``head``; ``delimiter`` is the usual one of files of its name."""
    encoding, guessed = _encoding(head)
    line = _first_line(head, encoding)
    found = {one: _cells(line, one) for one in dict.fromkeys((delimiter, *_DELIMITERS))}
    named = next((one for one, cells in found.items() if _names_images(cells)), None)
    if named is None:
        named = delimiter if len(found[delimiter]) > 1 else max(found, key=lambda one: len(found[one]))
    cells = found[named][1:]
    return Dialect(encoding, guessed, named, bool(cells) and all(cell.startswith(" ") for cell in cells))


def is_table(head: bytes) -> bool:
    """Whether a file without a known name is a table of images: its first line names columns, or is a row of one."""
    dialect = find_dialect(head)
    cells = _cells(_first_line(head, dialect.encoding), dialect.delimiter)
    return len(cells) > 1 and (_names_images(cells) or _is_image_file(cells[0].strip()))


def header_fault(names: Sequence[str]) -> str | None:
    """Why the first line cannot be the names of columns, or None."""
    if place := next(filter(_is_place, names), None):
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
    except UnicodeDecodeError:
        return _guess(head)
    return "utf-8", False


def _guess(head: bytes) -> tuple[str, bool]:
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


def _first_line(head: bytes, encoding: str) -> str:
    return head.decode(encoding, "replace").partition("\n")[0].rstrip("\r")


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _names_images(cells: Sequence[str]) -> bool:
    return any(cell.strip().lower() in (*IMAGES, *PLACES) for cell in cells)


def _is_place(name: str) -> bool:
    return "://" in name or _is_image_file(name)


def _is_image_file(name: str) -> bool:
    file = _CAPTION_NUMBER.sub("", name)
    return "." in file and is_image_name(file)
