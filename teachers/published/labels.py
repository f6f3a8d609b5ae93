"""How labels that others have published are joined with images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

#: What may join labels and images, strongest first.
JOINS = ("uid", "sha256", "digest", "url", "key")
if TYPE_CHECKING:
    Join = str
else:
    Join = Literal[JOINS]
