"""Rows of tables become samples: which columns hold the image, the key, the caption and the metadata."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from reinforce.input_config import Input, Limits
from reinforce.source.captions import as_lines, texts_of
from reinforce.source.file_types import image_extension
from reinforce.source.samples import RawSample, Refusal, UnreadSample
from schemas import Reason

#: Names of columns with images, with their places, and with keys: upper or lower case, in the order of preference.
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image_base64")
PLACES = ("file_name", "filename", "image_path", "filepath", "path", "image_url", "url", "image_name")
KEYS = ("key", "__key__", "uid")

_SHOWN_COLUMNS = 30
_LONGEST_PLACE = 4096


class NoColumn(ValueError):
    """A table that lacks a column that is needed, or has it with another type."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read. ``texts`` maps caption fields without ``json:`` to their columns;
    ``metadata`` are those of the json member, which has that of the image where it is a path or URL, ``all`` names all
    columns, for messages, and ``captions`` those with captions."""

    image: str
    key: str | None
    texts: Mapping[str, str]
    metadata: tuple[str, ...]
    all: tuple[str, ...]
    captions: tuple[str, ...] = ()

    @property
    def read(self) -> set[str]:
        """Every column that is needed."""
        return {self.image, *self.texts.values(), *self.metadata} | ({self.key} if self.key else set())


def find_columns(names: Sequence[str], spec: Input, plain: Sequence[str] | None = None) -> Columns:
    """The columns of a table with these ``names`` by a config; ``plain`` are those that metadata can be read from.

    Raises NoColumn.
    """
    image = _named(names, spec.image, "input.image", (*IMAGES, *PLACES))
    if image is None:
        raise NoColumn(f"no column has images: it has {_listed(names)}; name one in input.image")
    key = _named(names, spec.key, "input.key", KEYS)
    fields = [field.partition(":") for field in spec.caption_fields]
    texts = {}
    for field in (name for name, is_json, _ in fields if not is_json):
        column = next((c for c in (field, "text" if field == "txt" else "") if c in names and c != image), None)
        if column is not None:
            texts[field] = column
    wanted = {name for extension, is_json, name in fields if is_json and extension == "json"}
    if spec.metadata == "all":
        wanted |= {*names}
    elif spec.metadata != "none":
        wanted |= {*spec.metadata}
    metadata = tuple(name for name in (names if plain is None else plain) if name in wanted)
    captions = (*texts.values(), *(name for _, is_json, name in fields if is_json and name in metadata))
    return Columns(image, key, texts, metadata, tuple(names), captions)


def joined_rows(rows: Iterable[Any], find: Callable[[Sequence[str]], Columns], spec: Input) -> Iterator[Any]:
    """Make one row of rows with equal images that follow one another, with a list of their captions in each column.

    ``rows`` are (number, row) and faults; ``find`` finds the columns of a row by their names. Without
    ``captions_per_sample``, the rows as they are.
    """
    most = spec.captions_per_sample
    if most is None:
        yield from rows
        return
    held: Any = None  # (number, row)
    columns: Columns | None = None
    for item in rows:
        row = item[1] if isinstance(item, tuple) and isinstance(item[1], Mapping) else None
        image = held[1].get(columns.image) if held and columns else None
        if columns and row and image and row.get(columns.image) == image:
            add_captions(held[1], row, columns.captions, most)
            continue
        if held:
            yield held
        held = columns = None
        if row is None:
            yield item
            continue
        held = item[0], dict(row)
        with contextlib.suppress(NoColumn):  # which reading the row refuses
            columns = find([*row])
    if held:
        yield held


def add_captions(row: dict[str, Any], other: Mapping[str, Any], names: Sequence[str], most: int) -> None:
    """Add the captions of another row to a row, up to ``most`` in a column."""
    for name in names:
        known = texts_of(row.get(name))
        row[name] = [*known, *(text for text in texts_of(other.get(name)) if text not in known)][
            : max(most, len(known))
        ]


class RowReader:
    """Makes the samples of the rows of a shard. ``shard`` is its name: of rows without a key, the key is made of it."""

    def __init__(self, shard: str, spec: Input) -> None:
        self._shard, self._limits, self._several = shard, spec.limits, spec.captions_per_sample is not None

    def sample(self, number: int, row: Mapping[str, Any], columns: Columns) -> RawSample | UnreadSample | Refusal:
        """The sample of row ``number`` of the shard."""
        value = row.get(columns.key) if columns.key else None
        key = f"{self._shard}-{number:08d}" if value is None or value == "" else str(value)
        image, named = row.get(columns.image), columns.image.lower() in PLACES
        if isinstance(image, dict):
            named = image.get("bytes") is None
            image = image.get("path") if named else image.get("bytes")
        place = image if isinstance(image, str) and (is_place(image) or (named and not is_data(image))) else None
        sidecars, left_out = self._sidecars(key, row, columns, place)
        if place is not None:
            return UnreadSample(key, place, sidecars, left_out, columns.all)
        if isinstance(image, str):
            image = _from_base64(image, self._limits)
        if isinstance(image, Refusal):
            return Refusal(key, image.reason, f"column {columns.image}: {image.detail}")
        if not isinstance(image, bytes):
            what = "null" if image is None else f"of type {type(image).__name__}"
            return Refusal(key, Reason.NO_IMAGE, f"column {columns.image} is {what}")
        return make_sample(UnreadSample(key, "", sidecars, left_out, columns.all), image, self._limits)

    def _sidecars(
        self, key: str, row: Mapping[str, Any], columns: Columns, place: str | None
    ) -> tuple[dict[str, bytes], dict[str, Refusal]]:
        found: dict[str, bytes] = {}
        for field, column in columns.texts.items():
            value = row.get(column)
            if self._several:
                value = as_lines(value)
            elif isinstance(value, list):  # several captions
                value = next((one for one in value if isinstance(one, str) and one.strip()), None)
            if isinstance(value, str):
                found[field] = value.encode("utf-8", "replace")
        document = {name: row[name] for name in columns.metadata if name in row and name != columns.image}
        if place is not None and columns.image in columns.metadata:
            document[columns.image] = place
        if document:
            found["json"] = _to_json(document)
        limit = self._limits.sidecar_bytes
        left_out = {
            name: Refusal(
                key, Reason.SIDECAR_BYTES, f"{name}: {len(data)} bytes, above limits.sidecar_bytes of {limit}"
            )
            for name, data in found.items()
            if len(data) > limit
        }
        return {name: data for name, data in found.items() if name not in left_out}, left_out


def make_sample(place: UnreadSample, image: bytes, limits: Limits, url: str | None = None) -> RawSample | Refusal:
    """The sample with these bytes of its image; ``url`` is that of a file that holds nothing else."""
    if len(image) > limits.image_bytes:
        detail = f"{len(image)} bytes, above limits.image_bytes of {limits.image_bytes}"
        return Refusal(place.key, Reason.IMAGE_BYTES, detail)
    members = (image_extension(image), *place.sidecars, *place.left_out)
    return RawSample(
        place.key, image, 0, len(image), place.sidecars, place.left_out, {}, members, place.columns or None, url
    )


def is_place(text: str) -> bool:
    """Whether a text is a path or URL, and not a base64 image: these contain neither a dot nor ``://``."""
    head = text[:_LONGEST_PLACE]
    return not is_data(head) and ("." in head or "://" in head)


def is_data(text: str) -> bool:
    """Whether a text is a URL that holds the image itself."""
    return text.startswith("data:")


def _named(names: Sequence[str], configured: str | None, key: str, known: Sequence[str]) -> str | None:
    """The configured column, else the first of the known ones. Raises NoColumn if the configured one is missing."""
    if configured is not None:
        if configured not in names:
            raise NoColumn(f"{key}: there is no column {configured!r}; it has {_listed(names)}")
        return configured
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return ", ".join(name[:100] for name in names[:_SHOWN_COLUMNS]) + more


def _from_base64(text: str, limits: Limits) -> bytes | Refusal:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) * 3 // 4 > limits.image_bytes + 2:
        detail = f"{len(text)} base64 characters, above limits.image_bytes of {limits.image_bytes} bytes"
        return Refusal(None, Reason.IMAGE_BYTES, detail)
    with contextlib.suppress(ValueError):
        return base64.b64decode(text, validate=True)
    if text.isascii():
        with_others = text.translate({ord("-"): "+", ord("_"): "/", ord("\n"): None, ord("\r"): None})
        with contextlib.suppress(ValueError):
            return base64.b64decode(with_others + "=" * (-len(with_others) % 4), validate=True)
    return Refusal(None, Reason.IMAGE_BROKEN, f"neither base64 nor a path or URL: {text[:40]!r}")


def _to_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, default=_plain).encode()  # lone surrogates stay, as escapes


def _plain(value: Any) -> Any:
    """A value that JSON has no type for."""
    if isinstance(value, date | time):
        return value.isoformat()
    return None if isinstance(value, bytes | bytearray) else str(value)
