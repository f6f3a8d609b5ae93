"""What ``reinforce validate`` finds: a message for each problem, and the file that is at fault if one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: ``unreadable``: the storage has failed. ``damaged``: the bytes are not those that were written. ``misplaced``: a file
#: of another layer, shard or recipe. ``rows``: values that a run does not write. ``missing``: a file that should exist.
#: ``orphan``: a file that belongs to nothing. ``manifest``: dataset.json contradicts itself or the files.
#: ``count``: the source has another number of samples. ``quarantine``: the quarantine file of the layer is damaged.
#: ``view``: a view is damaged, or of other rows than the samples. ``codebook``: that of a layer is lost or has changed.
Kind = Literal[
    "unreadable", "damaged", "misplaced", "rows", "missing", "orphan", "manifest", "count", "quarantine", "view",
    "codebook",
]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One problem. ``layer`` and ``shard`` name the file, None if it is not in one file."""

    kind: Kind
    message: str
    layer: str | None = None
    shard: str | None = None

    @property
    def at_fault(self) -> bool:
        """Whether the file has a fault that ends if a run computes it again."""
        return self.kind in ("damaged", "misplaced", "rows") and None not in (self.layer, self.shard)
