"""The content of a set, hashed while it is read: what a kept result was made of.

Images, labels, captions, metadata, class names and templates count, in their order. Names of files and keys of samples
do not, so that a copy in other shards is the same set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

_BYTES = 16


@dataclass
class ContentDigest:
    """The digest of one pass over a set: of its class names and templates, and of its ``examples``, each hashed."""

    texts: list[Sequence[str]] = field(default_factory=list)
    examples: list[bytes] = field(default_factory=list)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return hash_content(self.texts, b"".join(self.examples)).hex()


def hash_content(value: Any, data: bytes = b"") -> bytes:
    """Hash an example: its target, a JSON value or one with such an attribute ``content``, and its image."""
    text = json.dumps(value, default=attrgetter("content")).encode()
    digest = hashlib.blake2b(text + b"\0", digest_size=_BYTES)
    digest.update(data)
    return digest.digest()
