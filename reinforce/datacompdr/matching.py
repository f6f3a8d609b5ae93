"""Which published sample belongs to a sample of the source: by what both state of the image, and by name last.

An identity is a value that a side states of its image. The kinds, strongest first: ``uid``, the SHA-256 of the
downloaded file, and the URL. Two samples match if one kind agrees and no kind that both state differs. The key alone
joins samples that have no kind in common.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias
from urllib.parse import quote, urlsplit

from reinforce.source.captions import parse_json

KINDS = ("uid", "sha256", "url")
#: Further names of counts: joined by the key alone; of another image; without a counterpart.
KEY, OTHER_IMAGE, ABSENT = "key", "other_image", "absent"

#: What a side states of an image: values by kind.
Identity: TypeAlias = "Mapping[str, str]"

_DEFAULT_PORTS = {("http", "80"), ("https", "443")}
_NORMAL_URL = re.compile(r"https?://[a-z0-9.-]+/[\w%/:?@!$&'()*+,;=~.-]*", re.ASCII)  # as most are
_KEPT = "%/:?#[]@!$&'()*+,;=~"  # characters of a URL that are not percent-encoded


def identity_of(sidecars: Mapping[str, bytes]) -> Identity:
    """The identity in a sample's members: ``uid``, ``sha256`` and ``url`` of ``json``, and ``url.txt``."""
    document = parse_json(sidecars["json"]) if "json" in sidecars else None
    found = {kind: document.get(kind) for kind in KINDS} if isinstance(document, dict) else {}
    if "url.txt" in sidecars:
        found["url"] = sidecars["url.txt"].decode(errors="replace")
    values = {kind: value.strip() for kind, value in found.items() if isinstance(value, str) and value.strip()}
    return {kind: _NORMAL[kind](value) if kind in _NORMAL else value for kind, value in values.items()}


def normal_url(url: str) -> str:
    """A URL in one spelling: scheme and host in lower case, without default port and fragment, percent-encoded."""
    if _NORMAL_URL.fullmatch(url):
        return url
    try:
        parts = urlsplit(url)
        path = quote(parts.path or "/", _KEPT) + (f"?{quote(parts.query, _KEPT)}" if parts.query else "")
    except ValueError:  # also of lone surrogates
        return url
    user, at, host = parts.netloc.rpartition("@")
    name, colon, port = host.lower().rpartition(":")
    host = name if colon and (parts.scheme, port) in _DEFAULT_PORTS else host.lower()
    return f"{parts.scheme}://{user}{at}{host}{path}"


_NORMAL = {"sha256": str.lower, "url": normal_url}


class Matcher:
    """Finds the entry, by its key, that belongs to a sample. ``counts`` are the samples by what matched, or why not.

    Without ``by_key``, the key alone joins nothing.
    """

    def __init__(self, by_key: bool = True) -> None:
        self._by_key = by_key
        self._identities: dict[str, Identity] = {}
        self._keys: dict[tuple[str, str], list[str]] = {}  # by kind and value
        self.counts: Counter[str] = Counter()

    def add(self, key: str, identity: Identity) -> None:
        """Add an entry."""
        self._identities[key] = identity
        for kind_and_value in identity.items():
            self._keys.setdefault(kind_and_value, []).append(key)

    def match(self, key: str, identity: Identity) -> tuple[str | None, str]:
        """The key of the entry of a sample and what matched; or None and why there is none."""
        differing: dict[str, str] = {}  # by key of an entry
        for kind in KINDS:
            for candidate in self._keys.get((kind, identity[kind]), ()) if kind in identity else ():
                if (differs := self._difference(candidate, identity)) is None:
                    return self._counted(kind, candidate, kind)
                differing[candidate] = differs
        own = self._identities.get(key)
        if own is not None and (differs := self._difference(key, identity)):
            differing[key] = differs
        elif own is not None and self._by_key:  # they have no kind in common
            return self._counted(KEY, key, KEY)
        for candidate, differs in differing.items():
            return self._counted(OTHER_IMAGE, None, f"{candidate!r} is of another image: {differs}")
        return self._counted(ABSENT, None, f"none with its {_listed([*identity, KEY])}")

    def _difference(self, key: str, identity: Identity) -> str | None:
        """The strongest kind that an entry and a sample both state with different values, with both; or None."""
        other = self._identities[key]
        for kind in KINDS:
            if kind in identity and kind in other and identity[kind] != other[kind]:
                return f"{kind} {identity[kind][:100]!r} here, {other[kind][:100]!r} there"
        return None

    def _counted(self, name: str, key: str | None, text: str) -> tuple[str | None, str]:
        self.counts[name] += 1
        return key, text


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def describe_counts(counts: Mapping[str, int]) -> str:
    """The counts of a Matcher for people, '' without any."""
    words = {kind: f"by {kind}" for kind in KINDS} | {
        KEY: "by key alone, which nothing confirms",
        OTHER_IMAGE: "not (another image)",
        ABSENT: "not (no counterpart)",
    }
    return ", ".join(f"{counts[name]:,} {word}" for name, word in words.items() if counts.get(name))
