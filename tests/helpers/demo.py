"""The demo's files, read with tarfile."""

from __future__ import annotations

import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "configs/demo-models"
Samples = dict[str, dict[str, bytes]]


def read_samples(path: Path) -> Samples:
    """Read a shard: contents by key and extension."""
    samples: Samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return samples


def read_shards(shards: list[Path]) -> Samples:
    """Read several shards."""
    return {key: members for path in shards for key, members in read_samples(path).items()}
