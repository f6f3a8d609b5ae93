"""Photos are read from Qt resource files as GCompris has them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from drills.photos.pictures import Photo, read_photos, read_resources, write_captioned, write_classes
from tests.helpers.data import picture

_BOARD = '{"title": qsTr("Eiffel Tower"), "text": qsTr("A tower\n of iron."), "audio": file("a"),\n "image2": "qrc:%s"}'


def write_resources(path: Path, files: dict[str, bytes]) -> None:
    """Write a resource file of version 2, whose root has one folder, ``board``, with the files; odd ones compressed."""
    content, names, entries = b"", _name(""), [struct.pack(">IHIIQ", 0, 2, 1, 1, 0)]
    entries.append(struct.pack(">IHIIQ", len(names), 2, len(files), 2, 0))
    names += _name("board")
    for number, (name, data) in enumerate(files.items()):
        stored = struct.pack(">I", len(data)) + zlib.compress(data) if number % 2 else data
        entries.append(struct.pack(">IHIIQ", len(names), number % 2, 0, len(content), 0))
        content += struct.pack(">I", len(stored)) + stored
        names += _name(name)
    tree = b"".join(entries)
    starts = (20 + len(content) + len(names), 20, 20 + len(content))
    path.write_bytes(struct.pack(">4s4I", b"qres", 2, *starts) + content + names + tree)


def _name(text: str) -> bytes:
    return struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")


def test_photos_have_the_titles_and_descriptions_of_their_boards(tmp_path: Path) -> None:
    board = (_BOARD % "/board/é.webp").encode()
    for name in ("explore_monuments", "explore_world_music", "explore_farm_animals", "explore_world_animals"):
        write_resources(tmp_path / f"{name}.rcc", {"é.webp": b"photo", "board1.qml": board})
    write_resources(tmp_path / "erase.rcc", {"red_panda.webp": b"panda", "erase.qml": b"", "chamaeleon.webp": b"c"})
    places, animals = read_photos(tmp_path)
    assert places == [Photo("Eiffel Tower", "A tower of iron.", b"photo")] * 2
    assert [(photo.title, photo.data) for photo in animals[2:]] == [("chamaeleon", b"c"), ("red panda", b"panda")]
    (tmp_path / "other").write_bytes(bytes(40))
    with pytest.raises(ValueError, match="is no Qt resource file"):
        read_resources(tmp_path / "other")


def test_photos_are_written_with_captions_and_by_class(tmp_path: Path) -> None:
    photos = [Photo("Chameleon", "It sees.", picture(0)), Photo("chamaeleon", "", picture(1))]
    write_captioned(photos, tmp_path / "captioned")
    texts = [path.read_text() for path in sorted((tmp_path / "captioned").glob("*.txt"))]
    assert texts == ["Chameleon. It sees.", "chamaeleon"]
    assert write_classes(photos, tmp_path / "classes") == ["chameleon"], "one animal with two spellings"
    assert len([*(tmp_path / "classes/chameleon").iterdir()]) == 2
