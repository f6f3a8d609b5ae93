"""Escaping of special tokens: caption text such as ``<end_of_text>`` must not become the token itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def special_token_escaper(tokens: Iterable[str]) -> Callable[[str], str]:
    """Return a function that breaks every spelling of the tokens, in any case, by a space after its first character.

    ``<end_of_text>`` becomes ``< end_of_text>``, which is tokenized as plain characters. Other text is unchanged.
    """
    spellings = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
    if not spellings:
        return lambda text: text
    pattern = re.compile("|".join(re.escape(token) for token in spellings), re.IGNORECASE)

    def escape(text: str) -> str:
        # Breaking one token can leave an overlapping one intact, so repeat until nothing matches.
        while (broken := pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)) != text:
            text = broken
        return text

    return escape
