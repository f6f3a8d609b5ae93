"""The titled photos of GCompris: its Qt resource files, and folders and tars of the photos as commands read them."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_SIDE = 448
_FOLDER, _COMPRESSED = 2, 1  # flags of an entry
_ENTRY = re.compile(
    r'"title":\s*qsTr\("(?P<title>.*?)"\),\s*"text":\s*qsTr\("(?P<text>.*?)"\),\s*(?:"audio":[^\n]*\n\s*)?'
    r'"image2":\s*"qrc:(?P<image>[^"]+)"',
    re.DOTALL,
)
_PLACES, _ANIMALS = ("explore_monuments", "explore_world_music"), ("explore_farm_animals", "explore_world_animals")
_UNTITLED = "erase"  # its photos of animals are titled by their names
_SYNONYMS = {"chamaeleon": "chameleon"}


@dataclass(frozen=True)
class Photo:
    """An encoded photo with its title, and its description in English where there is one."""

    title: str
    text: str
    data: bytes

    @property
    def caption(self) -> str:
        return f"{self.title}. {self.text}" if self.text else self.title


def read_resources(path: Path) -> dict[str, bytes]:
    """The files of a Qt resource file (.rcc) by path. Raises ValueError for another file."""
    data = path.read_bytes()
    magic, version, tree, content, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres":
        raise ValueError(f"{path} is no Qt resource file")
    size = 14 if version < 2 else 22  # since version 2 with a time

    def walk(number: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", data, tree + number * size)
        (length,) = struct.unpack_from(">H", data, names + name)
        place = folder + "/" + data[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be")
        if flags & _FOLDER:  # number and index of its entries
            for child in range(second, second + first):
                yield from walk(child, "" if number == 0 else place)
            return
        start = content + second
        (length,) = struct.unpack_from(">I", data, start)
        found = data[start + 4 : start + 4 + length]
        yield place, zlib.decompress(found[4:]) if flags & _COMPRESSED else found

    return dict(walk(0, ""))


def read_photos(folder: Path) -> tuple[list[Photo], list[Photo]]:
    """The photos of places and music, which have descriptions, and those of animals, from a folder of .rcc files."""
    places = [photo for name in _PLACES for photo in _described(folder / f"{name}.rcc")]
    animals = [photo for name in _ANIMALS for photo in _described(folder / f"{name}.rcc")]
    files = sorted(read_resources(folder / f"{_UNTITLED}.rcc").items())
    animals += [Photo(Path(name).stem.replace("_", " "), "", data) for name, data in files if name.endswith(".webp")]
    return places, animals


def _described(path: Path) -> Iterator[Photo]:
    files = read_resources(path)
    for name in sorted(files):
        if name.endswith(".qml") and "/board/" in name:
            for entry in _ENTRY.finditer(files[name].decode()):
                yield Photo(entry["title"], " ".join(entry["text"].split()), files[entry["image"]])


def write_captioned(photos: Sequence[Photo], folder: Path) -> None:
    """Write the photos with a text file beside each."""
    folder.mkdir(parents=True)
    for number, photo in enumerate(photos):
        (folder / f"{number:03}.webp").write_bytes(_small(photo.data))
        (folder / f"{number:03}.txt").write_text(photo.caption, encoding="utf-8")


def write_classes(photos: Sequence[Photo], folder: Path) -> list[str]:
    """Write the photos into a folder for each title -> the titles."""
    for number, photo in enumerate(photos):
        title = photo.title.lower()
        place = folder / _SYNONYMS.get(title, title)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03}.webp").write_bytes(_small(photo.data))
    return sorted(place.name for place in folder.iterdir())


def _small(data: bytes) -> bytes:
    """The photo with at most 448 pixels a side, which decodes in a tenth of the time."""
    image, buffer = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    image.save(buffer, "WEBP", quality=95)
    return buffer.getvalue()
