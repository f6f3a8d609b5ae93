from __future__ import annotations

import re


def slug(text: str) -> str:
    """A defect's name as keys, files and test ids hold it."""
    return re.sub(r"\W+", "-", text).strip("-")
