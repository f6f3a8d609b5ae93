"""What all exports have: what they read of a dataset, and their output folder with a record of what it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import AlignedLayers, AlignedShard
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.view import ViewRows
from reinforce.errors import UserError
from reinforce.source.references import ImageRoots
from reinforce.storage import Storage, as_seen_by_workers


@dataclass(frozen=True)
class ExportSource:
    """What an export reads, in any process: layers of the dataset at ``url``, ``samples`` first, or rows of a view.

    ``moved`` are former folders of the source, ``roots`` where images by reference may be read.
    """

    url: str
    fingerprints: Mapping[str, str]
    moved: Mapping[str, str]
    roots: ImageRoots
    view: ViewRows | None

    @classmethod
    def of(cls, data: Dataset, url: str, layers: Sequence[str]) -> ExportSource:
        """Some layers of the dataset at ``url``, which is open."""
        fingerprints = {name: data.fingerprints[name] for name in layers}
        view = None if data.view is None else data.view.rows
        return cls(as_seen_by_workers(url), fingerprints, data.manifest.get("moved", {}), data.roots, view)

    def open(self, shard: str, columns: Sequence[str]) -> AbstractContextManager[AlignedShard]:
        """Open the files of a shard, with some columns of its samples. Raises UserError."""
        layers = AlignedLayers(Store(self.url), self.fingerprints, {SAMPLES: columns}, self.moved, self.view)
        return layers.open(shard)


def check_output(dataset: Storage, output: Storage) -> None:
    """Raise UserError if an export would write into the dataset, or cannot write."""
    if f"{output.root}/".startswith(f"{dataset.root}/") and type(output.fs) is type(dataset.fs):
        raise UserError(f"{output.url} is in the dataset. Give another folder.")
    output.check_writable()


def record_export(output: Storage, config: Mapping[str, Any], name: str, options: str | None = None) -> None:
    """Write what is exported to the file ``name``. Raises UserError if the folder has another export.

    The error names the keys that differ, of ``config`` or of its section ``options``.
    """
    before = output.read_json(name)
    if before is None:
        output.write_json(config, name)
    elif before != config:
        own, other = (config, before) if options is None else (config[options], before.get(options))
        other = other if isinstance(other, dict) else {}
        different = [key for key in {**own, **other} if other.get(key) != own.get(key)]
        raise UserError(
            f"{output.url} has an export with other {', '.join(different) or 'content'}. Repeat the options of that "
            "one, or give another folder."
        )
