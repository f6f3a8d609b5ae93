"""The caption policy: make the caption and the metadata of a sample from the members next to its image."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from reinforce.input_config import Limits

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
    for field in fields:
        extension, is_json, name = field.partition(":")
        data = sidecars.get(extension)
        if data is None:
            continue
        for text in _json_texts(data, name, most) if is_json else _member_texts(data, most):
            if caption := clean_text(text, limits.caption_chars):
                found[caption] = None
            if len(found) == (most or 1):
                return [*found]
    return [*found]


def _json_texts(data: bytes, name: str, most: int | None) -> list[str]:
    document = parse_json(data)
    value = document.get(name) if isinstance(document, dict) else None
    return [] if most is None and isinstance(value, list) else texts_of(value)


def _member_texts(data: bytes, most: int | None) -> list[str]:
    text = _decode(data)
    if most is None:
        return [text]
    listed = texts_of(parse_json(data)) if text.lstrip().startswith("[") else []
    return listed or _LINE_ENDS.split(text)


def texts_of(value: Any) -> list[str]:
    """The texts of a value: itself, or those of a list."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def as_lines(value: Any) -> str | None:
    """The texts of a value as lines, from which ``captions_of`` reads them; None if there is none."""
    texts = [text for one in texts_of(value) if (text := _LINE_ENDS.sub(" ", one).strip())]
    return "\n".join(texts) or None


def why_no_caption(sidecars: Mapping[str, bytes], fields: Sequence[str], members: Sequence[str]) -> str:
    """Explain why no caption was found: where it was looked for, and the sample's ``members`` (extensions)."""
    looked = [f"{_place(field)}{_state(sidecars, field, members)}" for field in fields]
    present = ", ".join(sorted(f".{extension}" for extension in members))
    return f"no caption: looked for {', '.join(looked)}; the sample has {present}"[:500]


def _place(field: str) -> str:
    return field if ":" in field else f".{field}"


def _state(sidecars: Mapping[str, bytes], field: str, members: Sequence[str]) -> str:
    """Why the member of a caption field gives no caption; nothing where there is no such member."""
    extension, is_json, name = field.partition(":")
    data = sidecars.get(extension)
    if data is None:
        return " (not read)" if extension in members else ""
    if not is_json:
        return " (empty)"
    document = parse_json(data)
    if not isinstance(document, dict):
        return " (not a JSON object)"
    if texts_of(document.get(name)):
        return " (a list, of which input.captions_per_sample keeps several)"
    return " (empty, or not a text)" if name in document else " (no such field)"


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
        document = json.loads(text, strict=False, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return None if text.count("[") + text.count("{") > _MAX_DEPTH and _is_deep(document) else document


def _is_deep(document: Any) -> bool:
    """Whether lists and objects are nested more than _MAX_DEPTH levels deep."""
    level = [document]
    for _ in range(_MAX_DEPTH + 1):
        nested = [value for value in level if isinstance(value, (dict, list))]
        if not nested:
            return False
        level = [child for value in nested for child in (value.values() if isinstance(value, dict) else value)]
    return True


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def clean_text(text: str, max_chars: int) -> str:
    """Clean a text by policy ``text-1`` and cut it at ``max_chars`` characters."""
    text = _SURROGATES.sub("\ufffd", _CONTROLS.sub(" ", text)).strip()
    return text[:max_chars].rstrip()
