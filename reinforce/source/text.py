"""The caption policy: how the members beside an image become its caption and its metadata."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from reinforce.config import Limits

#: Name and version of what :func:`caption_of` does to text; recorded in dataset.json.
CAPTION_POLICY = "text-1"

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def caption_of(sidecars: Mapping[str, bytes], fields: Sequence[str], limits: Limits) -> str | None:
    """The first caption that is not empty among ``fields``, or None: policy ``text-1``.

    A field is a member's extension (``txt``) or EXTENSION:NAME of a top-level JSON string (``json:caption``).
    Text is UTF-8, or UTF-16 with its mark; what cannot be decoded becomes U+FFFD. Control characters, line ends
    among them, become one space each; ends are trimmed; ``limits.caption_chars`` characters are kept.
    """
    for field in fields:
        extension, is_json, name = field.partition(":")
        data = sidecars.get(extension)
        if data is None:
            continue
        if is_json:
            document = parse_json(data)
            text = document.get(name) if isinstance(document, dict) else None
        else:
            text = _decode(data)
        caption = clean_text(text, limits.caption_chars) if isinstance(text, str) else ""
        if caption:
            return caption
    return None


def metadata_of(sidecars: Mapping[str, bytes], keep: str | Sequence[str]) -> str | None:
    """The json sidecar as compact JSON text in its own order: ``all`` of it, or the top-level fields named.

    None for ``none``, where there is no valid JSON object, or where it has none of the fields. Numbers beyond
    JSON (NaN, Infinity, 1e999) become null; lone surrogates become U+FFFD.
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
    """Why a json member gives neither caption nor metadata; None where it can be read and is an object."""
    document = parse_json(data)
    if isinstance(document, dict):
        return None
    return f"JSON, but {document!r:.40}, no object" if document is not None else "no JSON, null, or nested too deeply"


def _decode(data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def parse_json(data: bytes) -> Any:
    """The JSON value, or None where it is invalid, nested too deeply or has a number of thousands of digits."""
    try:
        return json.loads(_decode(data), strict=False, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def clean_text(text: str, longest: int) -> str:
    """A text by policy ``text-1``, at most ``longest`` characters of it."""
    text = _SURROGATES.sub("\ufffd", _CONTROLS.sub(" ", text)).strip()
    return text[:longest].rstrip()
