"""Samples and refusals as sources yield them, and the limits on keys and shards."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from reinforce.input_config import Input, Limits
from reinforce.source.captions import caption_of, captions_of, clean_text, why_no_caption
from reinforce.source.file_types import NOT_A_FILE, folder_detail
from reinforce.source.urls import canonical
from schemas import Reason

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """A sample, or a part of it, that cannot be read; with key None, a problem of the shard as a whole."""

    key: str | None
    reason: Reason
    detail: str
    by_storage: bool = field(default=False, compare=False)  # whether the storage refused the file as a whole


class AbsentShard(OSError):
    """The storage of a shard states that it does not exist or may not be read; ``refusal`` is what follows from it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal


@dataclass(frozen=True)
class RawSample:
    """A sample as stored in its shard; ``offset`` and ``length`` locate the image in the uncompressed tar, in bytes."""

    key: str  # bytes of the name that are not UTF-8 are written as %XX
    image: bytes
    offset: int
    length: int
    sidecars: dict[str, bytes]  # by lower-case extension: txt, json, ...
    left_out: Mapping[str, Refusal] = field(default_factory=dict)  # by extension: sidecars that were not read, and why
    of_image: Mapping[str, bytes] = field(default_factory=dict)  # of an image v1.png: the sidecar v1.txt, as txt
    members: tuple[str, ...] = ()  # the extensions of all members, in order
    columns: tuple[str, ...] | None = None  # of a row of a table: the names of all columns
    url: str | None = None  # of a file that holds this image alone

    @property
    def all_sidecars(self) -> dict[str, bytes]:
        """The sidecars by extension, those that share the image's compound extension included."""
        return {**self.of_image, **self.sidecars}

    def caption(self, fields: Sequence[str], limits: Limits) -> str | None:
        """The caption by ``caption_of``; the sample's own sidecars take precedence over those of its image."""
        return caption_of(self.sidecars, fields, limits) or caption_of(self.all_sidecars, fields, limits)

    def captions(self, spec: Input) -> list[str]:
        """The true captions that a config keeps: one, or those by ``captions_of``, each in the texts of templates."""
        fields, limits, most = spec.caption_fields, spec.limits, spec.captions_per_sample
        found = captions_of(self.sidecars, fields, limits, most) or captions_of(self.all_sidecars, fields, limits, most)
        if spec.templates is None:
            return found
        texts = (text.replace("{}", caption) for caption in found for text in spec.templates)
        return [clean_text(text, limits.caption_chars) for text in itertools.islice(texts, most or 1)]

    def why_no_caption(self, fields: Sequence[str]) -> str:
        """Explain why no caption was found, with what the sample has."""
        if self.columns is None:
            return why_no_caption(self.all_sidecars, fields, self.members)
        looked = ", ".join(field.partition(":")[2] or field for field in fields)
        return f"no caption: looked for text in the columns {looked}; the row has {', '.join(self.columns)}"[:500]


@dataclass(frozen=True)
class UnreadSample:
    """A sample whose image is not read yet: a file of its own, at a path or URL."""

    key: str
    location: str
    sidecars: dict[str, bytes]
    left_out: Mapping[str, Refusal]
    columns: tuple[str, ...]


#: What formats yield.
Item = RawSample | UnreadSample | Refusal


@dataclass
class ReadBudget:
    """Bytes of an uncompressed tar that may still be read. At 0 the tar ends for its reader."""

    left: int


def refusing_absent(url: str, items: Iterator[T]) -> Iterator[T | Refusal]:
    """Yield the items of a shard, and a Refusal without a key if its file is missing or cannot be read."""
    try:
        yield from items
    except (FileNotFoundError, NotADirectoryError) as error:
        yield Refusal(None, Reason.SHARD_MISSING, _describe(error), by_storage=True)
    except IsADirectoryError as error:
        detail = NOT_A_FILE if error.strerror == NOT_A_FILE else folder_detail(canonical(url))
        yield Refusal(None, Reason.SHARD_UNREADABLE, detail)
    except PermissionError as error:
        yield Refusal(None, Reason.SHARD_UNREADABLE, _describe(error), by_storage=True)


def refused_key(key: str, limits: Limits, repeated: bool) -> Refusal | None:
    """Why a sample with this key is not stored; ``repeated`` is whether its shard has another before it."""
    if len(key) > limits.key_chars:
        detail = f"{len(key)} characters, above limits.key_chars of {limits.key_chars}"
        return Refusal(key[:100], Reason.KEY_CHARS, detail)
    if repeated:
        return Refusal(key, Reason.DUPLICATE_KEY, "the key occurs earlier in this shard; the first is kept")
    return None


def unique_keys(items: Iterator[Item], limits: Limits) -> Iterator[Item]:
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


def refused_rest(limits: Limits, first: str) -> Refusal:
    """The refusal of what follows the last sample that is read of a shard, from ``first`` on."""
    detail = f"more than limits.shard_samples of {limits.shard_samples}; the rest, from {first} on, is not read"
    return Refusal(None, Reason.SHARD_SAMPLES, detail)


def as_utf8(name: str) -> str:
    """Write bytes of a name that are not UTF-8 as %XX, so that different names stay different."""
    return re.sub(r"[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", name)


def _describe(error: OSError) -> str:
    return as_utf8(error.strerror or str(error) or type(error).__name__)
