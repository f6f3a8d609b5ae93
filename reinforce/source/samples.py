"""Samples and refusals as sources yield them, and the caption policy: the texts of the members next to an image."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from reinforce.source.config import Input, Limits
from reinforce.source.file_types import folder_detail, image_extension
from reinforce.source.urls import NOT_A_FILE, canonical
from schemas import Reason

#: Name and version of the text cleaning in :func:`captions_of`; recorded in dataset.json.
CAPTION_POLICY = "text-1"

#: What bytes become that cannot be decoded, and the name under which captions that have it are counted.
REPLACED, CAPTIONS_REPLACED = "\ufffd", "captions_replaced"

#: Levels of JSON. Python's own limit differs between its versions: 3.11 takes fewer than 1,000, 3.13 takes 10,000.
_MAX_DEPTH = 900

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LINE_ENDS = re.compile(r"[\r\n]+")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def caption_of(sidecars: Mapping[str, bytes], fields: Sequence[str], limits: Limits) -> str | None:
    """Return the caption of a sample that has one, as ``captions_of`` finds it, or None."""
    return next(iter(captions_of(sidecars, fields, limits)), None)


def captions_of(
    sidecars: Mapping[str, bytes], fields: Sequence[str], limits: Limits, most: int | None = None
) -> list[str]:
    """Return the first ``most`` different captions at all ``fields``, in their order, by policy ``text-1``.

    A field is a member's extension (``txt``) or EXTENSION:NAME of a top-level value in JSON (``json:caption``). A
    member holds a JSON list of texts, or a caption on each line; a JSON field holds a text or a list of texts. For
    ``most`` None, the first caption alone is returned: there, a member is one text, and a list in JSON is none.
    Text is UTF-8, or UTF-16 with a byte order mark; bytes that cannot be decoded become U+FFFD. Each control character,
    including line ends, becomes a space; whitespace at both ends is removed; the text is cut at
    ``limits.caption_chars`` characters.
    """
    found: dict[str, None] = {}
    for place in fields:
        extension, is_json, name = place.partition(":")
        data = sidecars.get(extension)
        if data is None:
            continue
        if is_json:
            document = parse_json(data)
            value = document.get(name) if isinstance(document, dict) else None
            texts = [] if most is None and isinstance(value, list) else texts_of(value)
        else:
            member = _decode(data)
            listed = texts_of(parse_json(data)) if most is not None and member.lstrip().startswith("[") else []
            texts = [member] if most is None else listed or _LINE_ENDS.split(member)
        for text in texts:
            if caption := clean_text(text, limits.caption_chars):
                found[caption] = None
            if len(found) == (most or 1):
                return [*found]
    return [*found]


def texts_of(value: Any) -> list[str]:
    """The texts of a value: itself, or those of a list."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def as_lines(value: Any) -> str | None:
    """The texts of a value as lines, from which ``captions_of`` reads them; None if there is none."""
    texts = [text for one in texts_of(value) if (text := _LINE_ENDS.sub(" ", one).strip())]
    return "\n".join(texts) or None


def metadata_of(sidecars: Mapping[str, bytes], keep: str | Sequence[str]) -> str | None:
    """Return the json sidecar as compact JSON text, keys in their original order.

    ``keep`` is ``all``, ``none`` or a list of top-level fields. The result is None for ``none``, for a sidecar that is
    not a valid JSON object, and if none of the fields is present. Numbers that JSON cannot express (NaN, Infinity,
    1e999) become null; lone surrogates become U+FFFD.
    """
    data = sidecars.get("json")
    if keep == "none" or data is None:
        return None
    document = parse_json(data)
    if not isinstance(document, dict):
        return None
    if keep != "all":
        document = {name: document[name] for name in keep if name in document}
        if not document:
            return None
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return None
    return _SURROGATES.sub("\ufffd", text)


def json_error(data: bytes) -> str | None:
    """Return why a json member cannot be used, or None if it is a valid JSON object."""
    document = parse_json(data)
    if document is None:
        return "invalid JSON, null, or nested too deeply"
    return None if isinstance(document, dict) else f"not a JSON object but {document!r:.40}"


def _decode(data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def parse_json(data: bytes) -> Any:
    """Parse JSON; return None if it is invalid, nested too deeply or has a number of thousands of digits."""
    text = _decode(data)
    try:
        document = json.loads(
            text,
            strict=False,
            parse_constant=lambda _: None,
            parse_float=lambda digits: number if math.isfinite(number := float(digits)) else None,
        )
    except (ValueError, RecursionError):
        return None
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return document
    level = [document]
    for _ in range(_MAX_DEPTH + 1):
        nested = [value for value in level if isinstance(value, (dict, list))]
        if not nested:
            return document
        level = [child for value in nested for child in (value.values() if isinstance(value, dict) else value)]
    return None


def clean_text(text: str, max_chars: int) -> str:
    """Clean a text by policy ``text-1`` and cut it at ``max_chars`` characters."""
    text = _SURROGATES.sub("\ufffd", _CONTROLS.sub(" ", text)).strip()
    return text[:max_chars].rstrip()


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


class DamagedTar(Exception):
    """The tar is broken at byte ``offset`` of the uncompressed stream."""

    def __init__(self, offset: int, detail: str) -> None:
        super().__init__(f"damaged at byte {offset}: {detail}")
        self.offset = offset
        self.detail = detail


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
        """Explain why no caption was found: where it was looked for, and what the sample has."""
        if self.columns is not None:
            names = ", ".join(field.partition(":")[2] or field for field in fields)
            return f"no caption: looked for text in the columns {names}; the row has {', '.join(self.columns)}"[:500]
        looked = []
        for place in fields:
            extension, is_json, name = place.partition(":")
            data = self.all_sidecars.get(extension)
            document = parse_json(data) if is_json and data is not None else None
            if data is None:
                why = " (not read)" if extension in self.members else ""
            elif not is_json:
                why = " (empty)"
            elif not isinstance(document, dict):
                why = " (not a JSON object)"
            elif texts_of(document.get(name)):
                why = " (a list, of which input.captions_per_sample keeps several)"
            else:
                why = " (empty, or not a text)" if name in document else " (no such field)"
            looked.append(f"{'' if is_json else '.'}{place}{why}")
        present = ", ".join(sorted(f".{extension}" for extension in self.members))
        return f"no caption: looked for {', '.join(looked)}; the sample has {present}"[:500]


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


def make_sample(place: UnreadSample, image: bytes, limits: Limits, url: str | None = None) -> RawSample | Refusal:
    """The sample with these bytes of its image; ``url`` is that of a file that holds nothing else."""
    if len(image) > limits.image_bytes:
        detail = f"{len(image)} bytes, above limits.image_bytes of {limits.image_bytes}"
        return Refusal(place.key, Reason.IMAGE_BYTES, detail)
    members = (image_extension(image), *place.sidecars, *place.left_out)
    return RawSample(
        place.key, image, 0, len(image), place.sidecars, place.left_out, {}, members, place.columns or None, url
    )


def as_utf8(name: str) -> str:
    """Write bytes of a name that are not UTF-8 as %XX, so that different names stay different."""
    return re.sub(r"[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", name)


def _describe(error: OSError) -> str:
    return as_utf8(error.strerror or str(error) or type(error).__name__)
