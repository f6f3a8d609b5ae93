"""The content of a set, hashed while it is read: what a kept result was made of.

Images, labels, captions, metadata, class names and templates count, in their order. Names of files and keys of samples
do not, so that a copy in other shards is the same set.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from reinforce.evaluation.reading import Example
from reinforce.source.samples import Refusal

_BYTES = 16


class ContentDigest:
    """The digest of the texts and examples of one pass over a set."""

    def __init__(self) -> None:
        self._texts: list[Sequence[str]] = []
        self._examples: list[bytes] = []  # a digest for each, in order; images are loaded in any order

    def add_texts(self, texts: Sequence[str]) -> None:
        """Add class names and templates."""
        self._texts.append(texts)

    def watch(self, examples: Iterator[Example | Refusal]) -> Iterator[Example | Refusal]:
        """Yield the examples; each is added when its image is loaded.

        A target is a JSON value, or has one in its attribute ``content``.
        """
        for item in examples:
            number = len(self._examples)
            self._examples.append(b"")
            if isinstance(item, Refusal):
                self._examples[number] = _hash(item.reason.value)
                yield item
            else:
                yield replace(item, load=functools.partial(self._load, number, item))

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return _hash(self._texts, b"".join(self._examples)).hex()

    def _load(self, number: int, item: Example) -> bytes:
        data = item.load()
        self._examples[number] = _hash(item.target, data)
        return data


def _hash(value: Any, data: bytes = b"") -> bytes:
    text = json.dumps(value, default=attrgetter("content")).encode()
    digest = hashlib.blake2b(text + b"\0", digest_size=_BYTES)
    digest.update(data)
    return digest.digest()
