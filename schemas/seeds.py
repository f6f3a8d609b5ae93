"""Seeds of everything random, derived from (dataset seed, sample key, purpose, index)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_philox = threading.local()


def seed_for(seed: int, key: str, purpose: str, index: int = 0) -> int:
    """Return a 64-bit seed, the same on every machine and Python version."""
    text = f"{seed}\0{key}\0{purpose}\0{index}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def philox_bits(key: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the first ``count`` words of NumPy's Philox generator with a key of 64 bits.

    The raw stream of a bit generator is the same in all NumPy versions; the methods of Generator are not. Setting the
    state of one generator takes a fifth of the time of creating another.
    """
    if not hasattr(_philox, "generator"):
        _philox.generator = np.random.Philox(key=0)
        _philox.state = _philox.generator.state
    _philox.state["state"]["key"][0] = key
    _philox.generator.state = _philox.state
    bits: npt.NDArray[np.uint64] = _philox.generator.random_raw(count)
    return bits


def uniforms(seed: int, keys: Sequence[str], purpose: str, index: int, count: int) -> npt.NDArray[np.float64]:
    """Return ``count`` (at most 8) numbers in [0, 1) per key, [len(keys), count].

    They are the same on every machine and NumPy version.
    """
    tail = f"\0{purpose}\0{index}"
    digests = (
        hashlib.blake2b(f"{seed}\0{key}{tail}".encode("utf-8", "surrogatepass"), digest_size=8 * count).digest()
        for key in keys
    )
    bits = np.frombuffer(b"".join(digests), "<u8").reshape(-1, count)
    return (bits >> np.uint64(11)) * np.float64(2.0**-53)


def permutation(length: int, seed: int, purpose: str, index: int = 0) -> Ints:
    """Return a seeded permutation of ``range(length)``, the same on every machine and NumPy version."""
    return np.argsort(philox_bits(seed_for(seed, "", purpose, index), length), kind="stable")
