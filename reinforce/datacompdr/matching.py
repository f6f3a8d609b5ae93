"""Which published sample belongs to a sample of the source: by what both state of the image, and by name last.

An identity is a value that a side states of its image. The kinds, strongest first: ``uid``, the SHA-256 of the
downloaded file, the digest of the encoded image, and the URL. Two samples match if one kind agrees and no kind that
both state differs. The key alone joins samples of which neither side states anything, and only if the config asks for
it. A digest also differs where a copy was encoded again, so it contradicts only what is weaker: the URL and the key.

Of several candidates, the one that agrees in other kinds too is taken. Where several agree alike, and no SHA-256 or
digest shows that they are of one image, none is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

from reinforce.source.captions import parse_json
from teachers.published.family import JOINS

#: Digest of the encoded image, in 16 hex digits. Members do not state it.
DIGEST = "digest"
KINDS = ("uid", "sha256", DIGEST, "url")
#: Kinds of which equal values are equal images.
PROOFS = ("sha256", DIGEST)
#: Further names of counts: joined by the key alone; of another image; without a counterpart; with the key of one, but
#: nothing that confirms it; with several that nothing distinguishes; with labels that cannot be read.
KEY, OTHER_IMAGE, ABSENT, UNCONFIRMED, BROKEN = "key", "other_image", "absent", "unconfirmed", "broken"
AMBIGUOUS = "ambiguous"
#: Most candidates of a sample that are compared with it.
MAX_CANDIDATES = 16

#: Prefix of the names of the counts of `labels`: ``labels.NAME.WHAT``.
PREFIX = "labels."

#: What a side states of an image: values by kind.
Identity: TypeAlias = "Mapping[str, str]"
T = TypeVar("T")

_DEFAULT_PORTS = {("http", "80"), ("https", "443")}
_NORMAL_URL = re.compile(r"https?://[a-z0-9.-]+/[\w%/:?@!$&'()*+,;=~.-]*", re.ASCII)  # as most are
_KEPT = "%/:?#[]@!$&'()*+,;=~"  # characters of a URL that are not percent-encoded


def identity_of(sidecars: Mapping[str, bytes]) -> Identity:
    """The identity in a sample's members: ``uid``, ``sha256`` and ``url`` of ``json``, and ``url.txt``."""
    document = parse_json(sidecars["json"]) if "json" in sidecars else None
    stated = (kind for kind in KINDS if kind != DIGEST)
    found = {kind: document.get(kind) for kind in stated} if isinstance(document, dict) else {}
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

    ``join`` is the weakest kind that may join: one of KINDS, or ``key``.
    """

    def __init__(self, join: str = "url") -> None:
        self._joins = JOINS[: JOINS.index(join) + 1]
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
            candidates = self._candidates(kind, identity)
            fitting = []
            for candidate in candidates or ():
                if differs := difference(identity, self._identities[candidate], kind):
                    differing[candidate] = differs
                else:
                    fitting.append((candidate, self._identities[candidate]))
            if kind in self._joins and (fitting or candidates is None):
                if (found := choose(identity, fitting)) is not None:
                    return self._counted(kind, found, kind)
                return self._counted(AMBIGUOUS, None, why_ambiguous(kind))
        own = self._identities.get(key)
        if own is not None and (differs := difference(identity, own)):
            differing[key] = differs
        for candidate, differs in differing.items():
            return self._counted(OTHER_IMAGE, None, f"{candidate!r} is of another image: {differs}")
        if own is not None:
            if KEY in self._joins and only_keys(key, identity, own):
                return self._counted(KEY, key, KEY)
            return self._counted(UNCONFIRMED, None, why_unconfirmed(key, identity, own, self._joins[-1]))
        return self._counted(ABSENT, None, f"none with its {_listed([*identity, KEY])}")

    def _candidates(self, kind: str, identity: Identity) -> Sequence[str] | None:
        """The entries that agree with a sample in a kind; of too many, those that agree in another kind too. None if
        these are none or too many."""
        found = self._keys.get((kind, identity[kind]), []) if kind in identity else []
        if len(found) <= MAX_CANDIDATES or kind in PROOFS:
            return found[:MAX_CANDIDATES]
        agreeing = min((self._keys[one] for one in identity.items() if one in self._keys), key=len)
        if len(agreeing) > MAX_CANDIDATES:
            return None
        return [key for key in agreeing if self._identities[key].get(kind) == identity[kind]] or None

    def _counted(self, name: str, key: str | None, text: str) -> tuple[str | None, str]:
        self.counts[name] += 1
        return key, text


def choose(own: Identity, candidates: Sequence[tuple[T, Identity]]) -> T | None:
    """The candidate of a sample that agrees with it in the strongest kinds; of several of one image the first.

    None if several agree alike, and neither SHA-256 nor digest shows that they are of one image. No candidate
    contradicts the sample.
    """
    left = [*candidates]
    for kind, value in ((kind, own[kind]) for kind in KINDS if kind in own):
        left = [one for one in left if one[1].get(kind) == value] or left
    proven = len(left) > 1 and any({one.get(kind) for _, one in left} == {left[0][1].get(kind, "")} for kind in PROOFS)
    return left[0][0] if proven or len(left) == 1 else None


def proves(one: Identity, other: Identity) -> bool:
    """Whether the SHA-256 or the digest of two sides shows that they are of one image."""
    return any(kind in one and one[kind] == other.get(kind) for kind in PROOFS)


def why_ambiguous(kind: str) -> str:
    """Why none of several candidates that agree in a kind is taken."""
    return f"several have its {kind}, and nothing else that both sides state distinguishes them"


def difference(one: Identity, other: Identity, agreed: str = KEY) -> str | None:
    """The strongest kind that two sides both state with different values, with both; or None.

    ``agreed`` is the kind that joins them. A digest contradicts only kinds that are weaker.
    """
    for kind in KINDS:
        if kind == DIGEST and agreed in KINDS and KINDS.index(agreed) <= KINDS.index(DIGEST):
            continue
        if kind in one and kind in other and one[kind] != other[kind]:
            return f"{kind} {one[kind][:100]!r} here, {other[kind][:100]!r} there"
    return None


def only_keys(key: str, one: Identity, other: Identity) -> bool:
    """Whether neither side of a ``key`` states anything else of its image.

    Each image has a digest, which counts where both state it. A uid that repeats the key states nothing else.
    """
    stated = {kind for side in (one, other) for kind, value in side.items() if value != key}
    return not stated - {DIGEST} and not (DIGEST in one and DIGEST in other)


def why_unconfirmed(key: str, one: Identity, other: Identity, join: str) -> str:
    """Why an entry with the same key as a sample does not belong to it, although nothing differs."""
    if only_keys(key, one, other):
        return "only the key agrees, which confirms nothing; `join: key` takes it"
    here, there = (_listed([*found], "nothing") for found in (one, other))
    allowed = "" if join in (KEY, KINDS[-1]) else f", and `join: {join}` takes nothing weaker"
    return f"only the key agrees: {here} stated here, {there} there{allowed}"


def _listed(names: Iterable[str], nothing: str = "") -> str:
    *others, last = [*names] or [nothing]
    return f"{', '.join(others)} or {last}" if others else last


def describe_counts(counts: Mapping[str, int]) -> str:
    """The counts of a Matcher for people, '' without any."""
    words = {kind: f"by {kind}" for kind in KINDS} | {
        KEY: "by key alone (join: key)",
        OTHER_IMAGE: "not (another image)",
        ABSENT: "not (no counterpart)",
        UNCONFIRMED: "not (by key alone, which nothing confirms)",
        AMBIGUOUS: "not (ambiguous: several rows state the same)",
        BROKEN: "not (labels that cannot be read)",
    }
    return ", ".join(f"{counts[name]:,} {word}" for name, word in words.items() if counts.get(name))
