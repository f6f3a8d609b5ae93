"""Images in files of their own with captions beside them: SugarCrepe, ShareGPT4V, Urban1k, XM3600, as published."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from reinforce.errors import UserError
from reinforce.evaluation.kinds.files import SetFiles
from reinforce.evaluation.reading import LabelledImage, make_loader
from reinforce.evaluation.registry import SuiteSet
from reinforce.source.urls import canonical, filesystem
from reinforce.source.whole_reads import read_whole

_PREFIX_BYTES = 32 * 2**20  # of ShareGPT4V's file of gigabytes, which has the set at its beginning


def read_annotated(one: SuiteSet, files: SetFiles) -> Iterator[LabelledImage]:
    """Yield the images of a set; targets are their captions, of SugarCrepe the right and the wrong one.

    Raises UserError for a file that cannot be read.
    """
    load, (_, root) = make_loader(files.folder), filesystem(files.folder)
    readers = {
        "sugarcrepe": _read_sugarcrepe,
        "sharegpt4v": _read_sharegpt4v,
        "pairs": _read_pairs,
        "xm3600": _read_xm3600,
    }
    try:
        for name, captions in readers[one.layout](one, files):
            if not captions or not all(isinstance(caption, str) and caption for caption in captions):
                raise UserError(f"{one.name}: {name} has no text for one of its captions.")
            yield LabelledImage(name, functools.partial(load, f"{root.rstrip('/')}/{name}"), captions)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        shown = canonical(files.shards[0])
        raise UserError(f"{one.name}: {shown} has another shape than the published file: {error!r}.") from error
    except OSError as error:
        raise UserError(f"{one.name}: a file of {canonical(files.folder)} cannot be read: {error}.") from error


def _read_sugarcrepe(one: SuiteSet, files: SetFiles) -> Iterator[tuple[str, list[Any]]]:
    for row in json.loads(_read(files.shards[0])).values():
        yield f"val2017/{row['filename']}", [row["caption"], row["negative_caption"]]


def _read_sharegpt4v(one: SuiteSet, files: SetFiles) -> Iterator[tuple[str, list[Any]]]:
    """The first rows of the file; the rest is not read."""
    fs, path = filesystem(files.shards[0])
    text = bytes(fs.cat_file(path, start=0, end=_PREFIX_BYTES)).decode("utf-8", "ignore")
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    for _ in range(one.size):
        position += len(text[position : position + 100]) - len(text[position : position + 100].lstrip(" \n\r\t,"))
        if text[position : position + 1] == "]":
            return
        row, position = decoder.raw_decode(text, position)
        yield row["image"], [row["conversations"][1]["value"].replace("\n", " ")]


def _read_xm3600(one: SuiteSet, files: SetFiles) -> Iterator[tuple[str, list[Any]]]:
    """The first caption of each image in the language that the key of the set ends with."""
    language = one.key.rpartition("/")[2]
    for line in _read(files.shards[0]).splitlines():
        row = json.loads(line)
        yield f"images/{row['image/key']}.jpg", row[language]["caption"][:1]


def _read_pairs(one: SuiteSet, files: SetFiles) -> Iterator[tuple[str, list[Any]]]:
    """The first line of each file of captions, and the image of its name."""
    for url in files.shards:
        lines = _read(url).splitlines()
        yield f"image/{url.rpartition('/')[2].removesuffix('.txt')}.jpg", lines[:1]


def _read(url: str) -> str:
    fs, path = filesystem(url)
    return read_whole(fs, path).decode("utf-8-sig")
