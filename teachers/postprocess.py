"""What becomes of captions before they are stored: cut, and bad ones replaced, as a config's ``clean:`` says.

Rows keep their length: the slots of captions that are dropped take the image's other captions, each in turn. So a
student never sees a bad one and sees what a captioner said twice as often as what it said once, no reader has slots to
skip, and nothing is encoded for padding, since equal texts are encoded once. Where no caption is left, the row is null.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

from teachers.spec import Clean

#: Name and version of what ``clean`` does to text; part of the fingerprint where it is asked for.
POLICY = "clean-1"
#: What can be counted, in the order it is done.
COUNTS = ("captions", "stripped", "cut", "empty", "repetitive", "duplicate", "null_rows")

_SPACE = re.compile(r"\s+")
#: A sentence's end: the mark, closing quotes or brackets, and then a space or nothing. Wide marks need no space.
_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)|[。！？]+[」』”’）]*""")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[a-z]|mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|jr|sr|u\.s)\.$", re.IGNORECASE)
_LONGEST_PERIOD, _COPIES = 8, 3
_TRAILING = " ,;:-–—(\"'"


def clean(captions: Sequence[str], rules: Clean) -> tuple[list[str] | None, Counter[str]]:
    """The captions of one image -> as many by the rules, or None; and how many were what, by ``COUNTS``."""
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
        elif rules.drop_repetitive and is_repetitive(short):
            reason = "repetitive"
        elif rules.drop_duplicates and same in seen:
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
    """The first sentence, and of it the words or characters that the rules allow, cut between words."""
    if rules.first_sentence:
        text = first_sentence(text)
    if rules.words is not None and len(words := text.split(" ")) > rules.words:
        text = " ".join(words[: rules.words]).rstrip(_TRAILING)
    if rules.characters is not None and len(text) > rules.characters:
        whole, space, _ = text[: rules.characters + 1].rpartition(" ")
        text = (whole if space else text[: rules.characters]).rstrip(_TRAILING)
    return text


def first_sentence(text: str) -> str:
    """Up to the first mark that ends a sentence; marks after initials and common abbreviations end none."""
    for end in _END.finditer(text):
        if not _ABBREVIATION.search(text[: end.end()]):
            return text[: end.end()]
    return text


def is_repetitive(text: str) -> bool:
    """Whether one to eight words stand three times in a row, in any case and punctuation."""
    words = [word for word in re.split(r"[\W_]+", text.casefold()) if word]
    for period in range(1, min(_LONGEST_PERIOD, len(words) // _COPIES) + 1):
        run = 0  # words that equal the one a period before
        for word, before in zip(words[period:], words, strict=False):
            run = run + 1 if word == before else 0
            if run == (_COPIES - 1) * period:
                return True
    return False
