"""What all exports have: what may be published, what they read of a dataset, and their output folder with a record.

Public are addresses that others reach, and settings without paths and secrets.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from reinforce.dataset.aligned import AlignedLayers, AlignedShard
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading import Dataset
from reinforce.dataset.store import Store
from reinforce.dataset.view import ViewRows
from reinforce.errors import UserError
from reinforce.labels.index import normal_url
from reinforce.source.references import ImageRoots
from reinforce.storage import Storage, as_seen_by_workers
from teachers.redact import redact_values

HIDDEN_PATH = "(local path)"
_PATH = re.compile(r"(?:file|local|local-dir):|[A-Za-z]:[\\/]|~?/[^/]|\.{1,2}[\\/]|\\\\")
_MAX_TEXT, _MAX_URL = 512, 4096  # characters of a uid, and of a URL


def public_url(url: str) -> str | None:
    """A web address in the spelling by which labels are joined; None for others.

    Others are local paths, hosts of a private network, and URLs with a user, password or signature.
    """
    if len(url) > _MAX_URL or not url.lower().startswith(("http://", "https://")):
        return None
    if ("@" in url or "?" in url) and redact_values(url) != url:
        return None
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return None
    return normal_url(url) if _is_public_host(host) else None


@functools.lru_cache(maxsize=2**14)
def _is_public_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".local", ".internal", ".localhost"))


def public_text(text: str) -> str | None:
    """A uid; None if it is a local path, or too long for one."""
    return None if len(text) > _MAX_TEXT or is_local_path(text) or redact_values(text) != text else text


def is_local_path(value: str) -> bool:
    """Whether a setting names a file of this machine."""
    return _PATH.match(value) is not None or (("/" in value or "\\" in value) and os.path.exists(value))


def without_paths(value: Any) -> Any:
    """A copy of settings without secrets, and with ``(local path)`` for each local path."""
    if isinstance(value, Mapping):
        return redact_values({name: without_paths(inner) for name, inner in value.items()})
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return HIDDEN_PATH if isinstance(value, str) and is_local_path(value) else redact_values(value)


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
