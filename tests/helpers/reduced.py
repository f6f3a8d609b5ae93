"""JPEGs by the image policies that reduce them. A process that imports this starts in a fraction of a second."""

from __future__ import annotations

import hashlib
from pathlib import Path

from reinforce.config import Limits
from reinforce.images.policy import decode


def policy(side: int) -> str:
    return f"rgb-1-reduced-{side}"


def decoded_digest(folder: Path) -> str:
    """SHA-256 of the pixels of all JPEGs in a folder at all scales."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        for name in ("rgb-1", policy(75), policy(37), policy(18)):
            digest.update(decode(path.read_bytes(), Limits(aspect=100), policy=name).tobytes())
    return digest.hexdigest()
