"""Cleaning of synthetic captions before they are stored, by ``clean:`` in the config: shorten, and replace bad ones.

Rows keep their length: a dropped caption is replaced by the image's remaining captions in turn. Students never see a
bad caption, readers have no empty slots to skip, and replacements cost nothing, since equal texts are encoded once.
Where no caption remains, the row is null.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from teachers.spec import Clean

#: Name and version of this policy, part of the fingerprint of captions that are cleaned.
POLICY = "clean-1"
#: Names of the counters, in the order of the steps.
COUNTS = ("captions", "stripped", "cut", "empty", "repetitive", "duplicate", "null_rows")

_SPACE = re.compile(r"\s+")
#: End of a sentence: a mark, closing quotes or brackets, then a space or nothing. Full-width marks need no space.
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)|[。！？]+[」』”’）]*""")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[a-z]|mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|jr|sr|u\.s)\.$", re.IGNORECASE)
_MAX_PERIOD, _COPIES = 8, 3
_TRAILING = " ,;:-–—(\"'"


def cleaning_identity(rules: Clean | None) -> dict[str, Any]:
    """Part of a captioner's identity; empty without rules."""
    if rules is None:
        return {}
    dropped = {f"drop_{what}": what in rules.drop for what in ("repetitive", "duplicates")}
    return {"clean": {"policy": POLICY, **rules.model_dump(exclude={"drop"}), **dropped}}


def clean(captions: Sequence[str], rules: Clean) -> tuple[list[str] | None, Counter[str]]:
    """Clean the captions of one image -> as many captions, or None if all are bad; and counters by ``COUNTS``."""
    counts: Counter[str] = Counter(captions=len(captions))
    kept: list[str | None] = []
    seen: set[str] = set()
    for caption in captions:
        text = _SPACE.sub(" ", caption).strip()
        counts["stripped"] += text != caption
        short = shorten(text, rules)
        counts["cut"] += short != text
        same = short.casefold().rstrip(" .!?")
        if not short:
            reason = "empty"
        elif "repetitive" in rules.drop and is_repetitive(short):
            reason = "repetitive"
        elif "duplicates" in rules.drop and same in seen:
            reason = "duplicate"
        else:
            kept.append(short)
            seen.add(same)
            continue
        counts[reason] += 1
        kept.append(None)
    good = [text for text in kept if text is not None]
    if not good:
        counts["null_rows"] += 1
        return None, counts
    others = itertools.cycle(good)
    return [next(others) if text is None else text for text in kept], counts


def shorten(text: str, rules: Clean) -> str:
    """Keep the first sentence and at most the allowed words and characters, cut between words."""
    if rules.first_sentence:
        text = first_sentence(text)
    if rules.words is not None and len(words := text.split(" ")) > rules.words:
        text = " ".join(words[: rules.words]).rstrip(_TRAILING)
    if rules.characters is not None and len(text) > rules.characters:
        whole, space, _ = text[: rules.characters + 1].rpartition(" ")
        text = (whole if space else text[: rules.characters]).rstrip(_TRAILING)
    return text


def first_sentence(text: str) -> str:
    """Text up to the end of the first sentence. Marks after initials and common abbreviations do not end one."""
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[: end.end()]):
            return text[: end.end()]
    return text


def is_repetitive(text: str) -> bool:
    """Whether a phrase of one to eight words occurs three times in a row, ignoring case and punctuation."""
    words = [word for word in re.split(r"[\W_]+", text.casefold()) if word]
    for period in range(1, min(_MAX_PERIOD, len(words) // _COPIES) + 1):
        run = 0  # consecutive words equal to the word one period before
        for word, before in zip(words[period:], words, strict=False):
            run = run + 1 if word == before else 0
            if run == (_COPIES - 1) * period:
                return True
    return False
