"""The pairs of a source, samples with captions, in groups: its files, or parts of them.

Groups are found once, before the ranks start. The numbers of tables, folders and reinforced datasets are known without
reading images, those of tars from ``sizes.json`` beside them, as open_clip reads it, or from their headers. Where
images are held out by their keys, or each caption is an example, every key and caption is read instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.captioning.config import Data
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES, require_images
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.view import open_view, read_view
from reinforce.errors import UserError
from reinforce.evaluation.fields import read_captions
from reinforce.evaluation.reading import (
    Table,
    check_no_view,
    detect_kind,
    input_of,
    list_shards,
    raise_on_damage,
    storage_errors,
)
from reinforce.input_config import Input
from reinforce.seeds import seed_for
from reinforce.source.captions import CAPTION_POLICY
from reinforce.source.formats import dataset as samples_layer
from reinforce.source.formats.base import Part, Shard
from reinforce.source.formats.lines import COMPRESSIONS
from reinforce.source.formats.recognise import find_format
from reinforce.source.reading import read_samples
from reinforce.source.samples import Item, RawSample, Refusal, UnreadSample
from reinforce.source.urls import canonical, filesystem
from reinforce.source.views import with_fingerprint
from reinforce.source.whole_reads import open_whole
from reinforce.student.data.datasets import samples_groups
from reinforce.terminal import plural, show_progress
from schemas import Reason

#: File in the output with the number of examples of each group.
GROUPS_FILE = "groups.parquet"
FINGERPRINT = b"fingerprint"  # in the metadata of files in the output
_ROWS = 1024  # of a part of a table or a folder, at least
_READERS = 16
_MOST_CAPTIONS = 64  # of a sample of a dataset
_MOST_SAMPLES = 10_000_000  # of a shard by sizes.json

_log = logging.getLogger(__name__)

#: A sample with its captions.
Pair: TypeAlias = "tuple[RawSample | UnreadSample, Sequence[str]]"
#: A group as a shard that is read at once, and the number of its samples, None if it is not known.
Group: TypeAlias = "tuple[Shard, int | None]"


@dataclass(frozen=True)
class PairSource:
    """The source at the key ``where`` of a config, with the ``share`` of its pairs that is held out, if there is one.

    ``view`` is one of the reinforced dataset at ``urls``.
    """

    where: str
    urls: str | list[str]
    view: str | None
    data: Data
    seed: int
    share: float | None = None

    @cached_property
    def is_dataset(self) -> bool:
        """Whether it is a reinforced dataset. Raises UserError where the storage cannot be reached."""
        return detect_kind(self.urls) == "layers"

    @cached_property
    def spec(self) -> Input:
        """How samples are read. Raises UserError for a view that cannot be read."""
        data, view = self.data, self.view
        spec = input_of(data.limits, data.images_from, data.captions, Table(format=data.format, image=data.image))
        if not self.is_dataset:
            check_no_view(self.urls, view, self.where)
            return spec
        if view is not None:
            view = with_fingerprint(view, read_view(Store(str(self.urls)), view).fingerprint)
        return spec.model_copy(update={"view": view, "captions_per_sample": _MOST_CAPTIONS})

    def pairs(
        self, shard: Shard, refused: Counter[str], *, images: bool = True, held_out: bool = False
    ) -> Iterator[Pair]:
        """Yield the pairs of a group in order: those that are not held out, or those that are.

        Refused samples are counted in ``refused`` by reason. Without ``images``, samples may lack theirs. Raises
        UserError for a shard that cannot be read completely.
        """
        if images:
            items: Iterator[Item] = read_samples(shard, self.spec)
        else:
            items = find_format(shard.format).read(shard, self.spec, images=False)
        for item in raise_on_damage(items, shard.file, self.where):
            if isinstance(item, Refusal):
                if self.is_dataset and item.reason is Reason.IMAGE_PLACE:
                    raise UserError(item.detail.replace("input.images_from", "data.images_from"))
                refused[item.reason.value] += 1
            elif self._is_held_out(item.key) == held_out:
                if captions := self._captions(item):
                    yield item, captions
                else:
                    refused[Reason.NO_TEXT.value] += 1

    def groups(self) -> list[Group]:
        """Find the groups. Raises UserError for a source that cannot be listed."""
        spec = self.spec  # found here, so that loader processes read with the same view
        if self.is_dataset:
            return [*self._row_groups()]
        sizes_of: dict[str, dict[str, int]] = {}
        shards = list_shards(self.urls, spec)
        with ThreadPoolExecutor(_READERS) as pool:
            divided = pool.map(lambda shard: [*_divide(shard, self.where, sizes_of)], shards)
            return [group for parts in show_progress(divided, len(shards), "shard") for group in parts]

    def counted(self, found: Sequence[Group], output: str) -> list[int]:
        """The number of examples of each group; those that are counted are kept in ``output``.

        Raises UserError for a shard that cannot be read completely.
        """
        every = self.data.use == "all" or self.share is not None
        unknown = [shard for shard, rows in found if rows is None or every]
        counts = iter(self._count(unknown, output) if unknown else ())
        return [next(counts) if rows is None or every else rows for _, rows in found]

    def fingerprint(self, shards: Sequence[Shard], *more: str) -> str:
        """Hash of everything that determines the pairs of groups, including the state of their files."""
        files = {(shard.file, shard.listing): replace(shard, url=shard.file, part=None) for shard in shards}
        with ThreadPoolExecutor(_READERS) as pool:
            states = [*pool.map(_state, files.values())]
        parts: dict[str, Any] = {
            "files": {"data": len(states)},
            "states": states,
            "captions": self.data.captions,
            "limits": self.data.limits.model_dump(),
            "policy": CAPTION_POLICY,
            "held_out": [self.share, self.seed],
        }
        if any(find_format(shard.format).is_table for shard in shards):
            parts["inputs"] = self.spec.model_dump(mode="json", exclude={"images_from"})
        if self.view is not None:
            parts["views"] = [self.spec.view]
        if more:
            parts["more"] = more
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def log_refused(self, refused: Counter[str]) -> None:
        """Log how many samples are left out, by reason."""
        if refused:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in refused.most_common())
            _log.warning("%s: samples that are left out: %s", self.where, reasons)

    def _is_held_out(self, key: str) -> bool:
        return self.share is not None and seed_for(self.seed, key, "held out") < int(self.share * 2**64)

    def _captions(self, item: RawSample | UnreadSample) -> Sequence[str]:
        sidecars = item.all_sidecars if isinstance(item, RawSample) else item.sidecars
        if self.is_dataset:  # whose samples may keep several captions
            several = read_captions(sidecars, ["lines:txt"], self.data.limits)
            if len(several) > 1:
                return several
        return read_captions(sidecars, self.data.captions, self.data.limits)

    def _row_groups(self) -> Iterator[Group]:
        store = Store(str(self.urls))
        manifest = read_manifest(store)
        require_images(manifest, str(self.urls))
        view = None if self.view is None else open_view(store, manifest, self.view)
        sizes, groups = samples_groups(store, {SAMPLES: manifest["layers"][SAMPLES]["fingerprint"]}, view)
        shards = [*sizes]
        for number, place, rows in groups.tolist():
            file = store.layer_path(SAMPLES, shards[number])
            part = Part(file, 0, rows, place, place + 1)
            yield Shard(file, shards[number], samples_layer.FORMAT.name, part=part), rows

    def _count(self, shards: Sequence[Shard], output: str) -> list[int]:
        """The examples of each group, read once for each training run."""
        store, fingerprint = Store(output), self.fingerprint(shards, self.data.use)
        if (stored := read_table(store, GROUPS_FILE, fingerprint, ["rows"])) is not None:
            return [int(rows) for rows in stored["rows"].to_pylist()]
        _log.info("counting the samples of %s, which is done once", plural(len(shards), "part"))
        refused = Counter[str]()
        counts = []
        with ThreadPoolExecutor(_READERS) as pool:
            for count, reasons in show_progress(pool.map(self._count_group, shards), len(shards), "part"):
                counts.append(count)
                refused.update(reasons)
        self.log_refused(refused)
        table = pa.table({"rows": pa.array(counts, pa.int64())})
        store.write_table(table.replace_schema_metadata({FINGERPRINT: fingerprint}), GROUPS_FILE)
        return counts

    def _count_group(self, shard: Shard) -> tuple[int, Counter[str]]:
        refused, every = Counter[str](), self.data.use == "all"
        found = self.pairs(shard, refused, images=False)
        return sum(len(captions) if every else 1 for _, captions in found), refused


def read_table(store: Store, name: str, fingerprint: str, columns: list[str]) -> pa.Table | None:
    """Columns of a table that was written with this fingerprint to the output, or None."""
    path = store.path(name)
    if not store.fs.exists(path):
        return None
    with storage_errors(f"{store.url}/{name} cannot be read", "Delete it."), open_whole(store.fs, path) as file:
        table = pq.read_table(file, columns=columns, page_checksum_verification=True)
    return table if (table.schema.metadata or {}).get(FINGERPRINT) == fingerprint.encode() else None


def _divide(shard: Shard, where: str, sizes_of: dict[str, dict[str, int]]) -> Iterator[Group]:
    format_ = find_format(shard.format)
    fix = "Check the path, or download it again."
    with storage_errors(f"{where}: {canonical(shard.file)} cannot be read", fix):
        if format_.is_listed:
            lines = shard.lines()
            for first in range(0, len(lines), _ROWS):
                part = lines[first : first + _ROWS]
                yield replace(shard, listing=b"\n".join(part)), len(part)
        elif format_.is_table:
            # Reading a part of a compressed file would unpack those before it.
            whole = canonical(shard.url).lower().endswith(tuple(f".{end}" for end in COMPRESSIONS))
            for piece in format_.parts(shard.url, 2**62 if whole else _ROWS):
                yield replace(shard, part=piece), piece.rows
        else:
            if shard.folder not in sizes_of:
                sizes_of[shard.folder] = _sizes_beside(shard.folder)
            yield shard, sizes_of[shard.folder].get(posixpath.basename(canonical(shard.url)))


def _sizes_beside(folder: str) -> dict[str, int]:
    """The samples of each shard by ``sizes.json`` in their folder, as webdataset's tools write it; none without it.

    Numbers that no shard has are left out, so that these shards are counted.
    """
    try:
        fs, path = filesystem(f"{folder}/sizes.json")
        found = json.loads(fs.cat_file(path))
    except Exception:  # each storage driver raises its own exceptions; the shards are counted then
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: rows for name, rows in found.items() if type(rows) is int and 0 <= rows <= _MOST_SAMPLES}


def _state(shard: Shard) -> tuple[str, str]:
    """The URL of a shard, and what changes with its content."""
    url = shard.url
    if isinstance(shard.listing, bytes):
        return canonical(url), hashlib.sha256(shard.listing).hexdigest()
    fs, path = filesystem(url)
    with storage_errors(f"{canonical(url)} cannot be reached", "Check the URL and credentials."):
        try:
            return canonical(url), fs.ukey(path)
        except FileNotFoundError as error:
            raise UserError(f"{canonical(url)} does not exist. Check the URL of the shards.") from error
