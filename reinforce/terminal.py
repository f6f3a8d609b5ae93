"""Text as a terminal may show it: names and messages come from data, and data may hold what terminals obey."""

from __future__ import annotations

import re

# Control characters but for line ends and tabs, and what turns the direction of writing.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with such characters written as ``\\x1b`` or ``\\u202e``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
