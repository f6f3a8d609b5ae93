"""Keys that occur in several shards, found in a sample of their hashes of bounded size.

A key is in the sample if its hash is at most a limit. So a key is sampled in every shard that has it, and the share of
repeated keys in the sample is that of the dataset. The limit sinks as the sample grows; small datasets are counted
exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reinforce.terminal import plural

Hashes = npt.NDArray[np.uint64]
#: Hashes that are kept of each shard, and of all shards.
SHARD_HASHES = 1024
DATASET_HASHES = 2**18
#: The limit under which every key is sampled.
ALL = 2**64 - 1


@dataclass(frozen=True)
class ShardKeys:
    """The distinct hashes of a shard's keys that are at most ``limit``, uint64 in ascending order."""

    hashes: Hashes
    limit: int = ALL

    @classmethod
    def of(cls, keys: Iterable[str]) -> ShardKeys:
        digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
        return cls(np.unique(np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)))

    def joined(self, other: ShardKeys, most: int = SHARD_HASHES) -> ShardKeys:
        """With further keys of the shard; at most ``most`` of the hashes, the smallest ones."""
        merged = ShardKeys(np.union1d(self.hashes, other.hashes)).below(min(self.limit, other.limit))
        return merged if len(merged.hashes) <= most else merged.below(int(merged.hashes[most - 1]))

    def below(self, limit: int) -> ShardKeys:
        """The hashes up to a limit."""
        if limit >= self.limit:
            return self
        return ShardKeys(self.hashes[: np.searchsorted(self.hashes, np.uint64(limit), side="right")].copy(), limit)


@dataclass(frozen=True)
class RepeatedKeys:
    """Result of comparing the keys of ``shards`` shards.

    ``keys`` counts those that occur in more than one shard, an estimate unless ``exact``; ``share`` is their share of
    all keys, and ``pair`` names two shards that have keys in common.
    """

    keys: int
    share: float
    exact: bool
    shards: int
    pair: tuple[str, str] | None = None

    def lines(self, shards: int, url: str) -> list[str]:
        """For people: none if no key is repeated and all ``shards`` of the dataset at ``url`` were compared."""
        lines = []
        if self.pair is not None:
            count = f"{'' if self.exact else 'about '}{plural(self.keys, 'key')}"
            lines.append(
                f"repeated keys: {count}, {self.share:.2%} of all, in more than one shard, for example in "
                f"{self.pair[0]} and {self.pair[1]}"
            )
        if self.shards < shards:
            lines.append(
                f"keys: {self.shards:,} of {shards:,} shards were compared, those that runs have recorded; `reinforce "
                f"validate {url}` compares all"
            )
        return lines


class KeySample:
    """The sampled keys of many shards: at most ``capacity`` hashes, of which ``limit`` is the largest possible one."""

    def __init__(self, capacity: int = DATASET_HASHES) -> None:
        self._capacity = capacity
        self.limit = ALL
        self._shards: dict[str, ShardKeys] = {}
        self._total = 0

    def add(self, shard: str, keys: ShardKeys) -> None:
        """Add a shard, or replace it."""
        self.limit = min(self.limit, keys.limit)
        before = self._shards.get(shard, _NO_KEYS)
        self._shards[shard] = keys.below(self.limit)
        self._total += len(self._shards[shard].hashes) - len(before.hashes)
        if self._total > self._capacity:
            self._trim()
            if self._total > self._capacity:
                every = np.concatenate([of_shard.hashes for of_shard in self._shards.values()])
                self.limit = int(np.partition(every, len(every) // 2)[len(every) // 2])
                self._trim()

    def __getitem__(self, shard: str) -> ShardKeys:
        return self._shards.get(shard, _NO_KEYS).below(self.limit)

    def _trim(self) -> None:
        self._shards = {shard: self[shard] for shard in self._shards}
        self._total = sum(len(keys.hashes) for keys in self._shards.values())

    def repeated(self, shards: Collection[str] | None = None) -> RepeatedKeys:
        """Count the keys that occur in more than one of ``shards``; default: all that were added."""
        names = sorted(name for name in self._shards if shards is None or name in shards)
        parts = [self[name].hashes for name in names]
        every = np.concatenate(parts) if parts else _NO_KEYS.hashes
        every.sort()
        same = every[1:][every[1:] == every[:-1]]  # a shard has each of its hashes once
        repeated = len(np.unique(same))
        estimate = round(repeated * (ALL / max(1, self.limit)))
        share = repeated / max(1, len(every) - len(same))
        owners = [name for name, part in zip(names, parts, strict=True) if len(same) and (part == same[0]).any()]
        pair = (owners[0], owners[1]) if owners else None
        return RepeatedKeys(estimate, share, self.limit == ALL, len(names), pair)


_NO_KEYS = ShardKeys(np.empty(0, np.uint64))
