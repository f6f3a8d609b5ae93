"""Published reinforcements such as DataCompDR and DFNDR: augmentations, captions and vectors for existing images.

A sample of such a tar has ``paug.json`` (augmentation parameters), ``syn.json`` (lists of synthetic captions) and the
vectors of all teachers, concatenated, in ``npz`` or ``pth.gz``. It may have an image or not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping

from reinforce.config import Config
from reinforce.datacompdr.members import CAPTIONS, PARAMETERS, VECTORS, Unreadable
from reinforce.datacompdr.values import Members, PublishedReader
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.errors import StorageError, UserError
from reinforce.source.captions import parse_json
from reinforce.source.formats.tar import read_shard
from reinforce.source.samples import RawSample, Refusal
from reinforce.source.urls import canonical
from schemas import WHOLE_SHARD, Reason

_SIDECAR, _URL = "json", "url.txt"
_CHECKED_SAMPLES = 8
_LARGEST_IMAGE = (2**31, 2**31)  # any crop fits into it


class Reinforcements:
    """The published reinforcements of one shard, by key.

    The members are copied to an unnamed temporary file, since the source may have its images in another order.
    ``limit`` bounds the samples. ``refusals`` lists what could not be read of the shard.
    """

    def __init__(self, url: str, config: Config, limit: int | None = None) -> None:
        self._members: dict[str, dict[str, tuple[int, int]]] = {}  # offset and length, by key and name
        self._keys: dict[str, str] = {}  # by uid
        self._keys_with_uid: set[str] = set()
        self._keys_of_urls: dict[str, str] = {}
        self._matched: set[str] = set()
        self.refusals: list[Refusal] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        offset = 0
        for item in itertools.islice(read_shard(url, config.input.limits, images=False), limit):
            if isinstance(item, Refusal):
                self.refusals.append(Refusal(item.key, item.reason, f"reinforcements: {item.detail}"))
                continue
            members = self._members[item.key] = {}
            if (uid := _uid(item.sidecars)) is not None:
                self._keys.setdefault(uid, item.key)
                self._keys_with_uid.add(item.key)
            if (url_of_image := _url(item.sidecars)) is not None:
                self._keys_of_urls.setdefault(url_of_image, item.key)
            for name in (PARAMETERS, CAPTIONS, *VECTORS):
                if name in item.left_out:
                    self.refusals.append(item.left_out[name])
                if (data := item.sidecars.get(name)) is not None:
                    members[name] = (offset, len(data))
                    with _disk_errors():
                        offset += self._file.write(data)
        with _disk_errors():
            self._file.flush()

    @property
    def shard_refusal(self) -> Refusal | None:
        """Why the shard as a whole cannot be read, or None."""
        return next((r for r in self.refusals if r.key is None and r.reason.value in WHOLE_SHARD), None)

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._members)

    def match(self, raw: RawSample) -> str | None:
        """The key of a source sample's reinforcements, found by its ``uid``, URL or key; None without any."""
        uid = _uid(raw.sidecars)
        key = raw.key if uid is None else self._keys.get(uid, uid)
        if uid is None or key not in self._members:
            url = _url(raw.all_sidecars)
            key = key if url is None else self._keys_of_urls.get(url, key)
        # A key whose reinforcements have a uid belongs to the sample of that uid.
        if key not in self._members and raw.key not in self._keys_with_uid:
            key = raw.key
        if key not in self._members:
            return None
        self._matched.add(key)
        return key

    def unmatched(self) -> Iterator[Refusal]:
        """Refusals of the reinforcements that no source sample has matched."""
        for key in self._members:
            if key not in self._matched:
                yield Refusal(key, Reason.NO_IMAGE, "reinforced, but the source's shard has no sample of this key")

    def members(self, key: str) -> dict[str, bytes] | None:
        """The members of a sample by name, or None if the reinforcements lack the key."""
        places = self._members.get(key)
        if places is None:
            return None
        return {name: os.pread(self._file.fileno(), size, offset) for name, (offset, size) in places.items()}


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn an error of the temporary file into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reinforcements cannot be copied to {tempfile.gettempdir()}: {error}; make room there, or set TMPDIR."
        ) from error


def check_reinforcements(url: str, config: Config, layers: Iterable[Layer]) -> None:
    """Raise UserError if the config does not fit these reinforcements: some layer is unreadable in all of the first
    samples of a shard."""
    reader = PublishedReader(config, layers)
    with contextlib.closing(Reinforcements(url, config, _CHECKED_SAMPLES)) as reinforcements:
        errors = [_layer_errors(reader, key, reinforcements.members(key) or {}) for key in reinforcements]
    for layer in errors[0] if errors else ():
        if all(layer in others for others in errors):
            raise UserError(
                f"{layer}: cannot be read from any of the first {len(errors)} samples of {canonical(url)}: "
                f"{errors[0][layer]}"
            )


def _layer_errors(reader: PublishedReader, key: str, members: Members) -> dict[str, str]:
    """What cannot be read of a sample, by layer, independently of its image."""
    errors = {}
    try:
        reader.augmentations(members, *_LARGEST_IMAGE)
    except Unreadable as error:
        errors[SAMPLES] = str(error)
    return errors | {
        name: value.detail for name, value in reader.values(key, members).items() if isinstance(value, Refusal)
    }


def _uid(sidecars: Mapping[str, bytes]) -> str | None:
    document = parse_json(sidecars[_SIDECAR]) if _SIDECAR in sidecars else None
    uid = document.get("uid") if isinstance(document, dict) else None
    return uid if isinstance(uid, str) else None


def _url(sidecars: Mapping[str, bytes]) -> str | None:
    """The URL of an image: the member ``url.txt``, or ``url`` of the JSON member, as img2dataset writes it."""
    if _URL in sidecars:
        return sidecars[_URL].decode(errors="replace").strip() or None
    document = parse_json(sidecars[_SIDECAR]) if _SIDECAR in sidecars else None
    url = document.get("url") if isinstance(document, dict) else None
    return url if isinstance(url, str) else None
