"""Captions in COCO's JSON: one document with ``images`` (``id``, ``file_name``) and ``annotations`` (``image_id``,
``caption``). The images are in files of their own, and each image is a row with all of its captions.

The document is read as a whole, 118,287 images of COCO's training set in 0.5 GB of memory.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from reinforce.source.config import Input
from reinforce.source.formats.base import Part, divided
from reinforce.source.formats.jsonl import BrokenRow, LinesFormat, Row
from reinforce.source.urls import filesystem, read_whole, report_opened

_MOST_BYTES = 2**30
_START = re.compile(rb'\s*\{\s*"(info"\s*:\s*\{|(licenses|images|annotations)"\s*:\s*\[\s*\{)')


class Coco(LinesFormat):
    name = "coco"
    noun = "JSON file of COCO's captions"
    line = "an image with a file_name"
    content_endings = (".json",)
    whole_bytes = 2**24  # it names images, and holds none
    referable = True

    def recognises(self, head: bytes) -> bool:
        return _START.match(head) is not None and b"}\n{" not in head

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        rows = _rows_of(url)
        first, last = (part.first, part.first + part.rows) if part else (0, len(rows))
        yield from itertools.islice(enumerate(rows), first, last)

    def count(self, url: str, spec: Input) -> int | None:
        if spec.captions_per_sample is not None:
            return super().count(url, spec)
        try:
            return min(len(_rows_of(url)), spec.limits.shard_samples)
        except EOFError:
            return None

    def parts(self, url: str, rows: int, last: Part | None = None) -> Iterator[Part]:
        return divided(url, rows, ((1, number + 1) for number in range(len(_rows_of(url)))), last)


def _rows_of(url: str) -> Sequence[Row | BrokenRow]:
    """The rows of a document. Raises EOFError if it is none of COCO's, and the errors of the storage."""
    fs, path = filesystem(url)
    info = fs.info(path)
    report_opened(fs, path, info=info)
    return _parsed(url, info.get("size") or 0, str(info))


@functools.lru_cache(maxsize=1)  # the parts of a file follow one another
def _parsed(url: str, size: int, state: str) -> Sequence[Row | BrokenRow]:
    fs, path = filesystem(url)
    if size > _MOST_BYTES:
        raise EOFError(
            f"more than {_MOST_BYTES:,} bytes, which are read at once; write jsonl with a line for each image"
        )
    try:
        document = json.loads(read_whole(fs, path))
        images, annotations = document["images"], document["annotations"]
        texts: dict[Any, list[str]] = {}
        for one in annotations:
            if isinstance(caption := one.get("caption"), str):
                texts.setdefault(one["image_id"], []).append(" ".join(caption.split()))
        rows: list[Row | BrokenRow] = []
        for image in images:
            if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
                rows.append(BrokenRow(f"an image without id or file_name: {str(image)[:100]}"))
                continue
            values = {name: value for name, value in image.items() if not isinstance(value, list | dict)}
            rows.append({**values, "key": str(image["id"]), "text": texts.get(image["id"], [])})
        return rows
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EOFError(
            f"it does not have COCO's captions, `images` (id, file_name) and `annotations` (image_id, caption): "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


FORMAT = Coco()
