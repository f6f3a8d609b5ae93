"""Paths of a view's files, and names of views in configs."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = "views"
_AT = "@"  # between the name and the fingerprint of a view


def with_fingerprint(name: str, fingerprint: str) -> str:
    """A view with its fingerprint, as ``input.view`` may name it and dataset.json records it."""
    return f"{name}{_AT}{fingerprint}"


def split_view(view: str) -> tuple[str, str]:
    """The name and the fingerprint of a view; the latter is empty if it has none."""
    name, _, fingerprint = view.partition(_AT)
    return name, fingerprint


def rows_path(name: str, fingerprint: str, shard: str) -> tuple[str, ...]:
    """The parts of the path, in the dataset, of the file that has why each row of a shard is left out."""
    return FOLDER, name, f"rows-{fingerprint}", f"{shard}.parquet"


def digest_of(content: bytes) -> int:
    """The digest of a file of a view, as the view states it."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def shards_path(name: str, fingerprint: str) -> tuple[str, ...]:
    """The parts of the path of the file that counts the rows of each shard, with the digests of their files."""
    return FOLDER, name, f"shards-{fingerprint}.parquet"


@dataclass(frozen=True)
class RowDigests:
    """The digest of the file with the rows of each shard; views of version 1 state none."""

    shards: pa.StringArray
    digests: npt.NDArray[np.uint64]

    @classmethod
    def parse(cls, content: bytes | None) -> RowDigests:
        """Read them from the file at ``shards_path``, None if there is none. Raises what Arrow raises."""
        if content is None:
            return cls(pa.array([], pa.string()), np.empty(0, np.uint64))
        table = pq.read_table(pa.BufferReader(content), columns=["shard", "digest"])
        return cls(table["shard"].combine_chunks(), table["digest"].to_numpy())

    def check(self, shard: str, content: bytes) -> bool:
        """Whether a file has the digest of the rows of a shard, or there is none."""
        if not len(self.shards):
            return True
        place = bisect.bisect_left(self.shards, shard, key=str)
        known = place < len(self.shards) and self.shards[place].as_py() == shard
        return known and int(self.digests[place]) == digest_of(content)
