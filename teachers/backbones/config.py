"""The config in the folder of a network of images, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Name of the file, in timm's folders too.
CONFIG = "config.json"
#: Key of a network that a class or function builds.
CLASS = "class"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a folder; empty if it has none that is a JSON object."""
    try:
        found = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
