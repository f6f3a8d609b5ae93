"""One way to seed everything random: (dataset seed, sample key, purpose, index)."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, key: str, purpose: str, index: int = 0) -> int:
    """64-bit seed, equal on every machine and Python version."""
    text = f"{seed}\0{key}\0{purpose}\0{index}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
