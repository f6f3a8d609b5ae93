from __future__ import annotations

import re


def slug(text: str) -> str:
    """The name of a defect in keys, file names and test ids."""
    return re.sub(r"\W+", "-", text).strip("-")
