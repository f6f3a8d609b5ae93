"""The held-out images of a training run, with their captions: a file in the output, which evaluations read again and
again.

Of a share these are the first ones of the groups in a seeded order, of a source of their own a seeded sample or all.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

import schemas
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.source import FINGERPRINT, Pair, PairSource, read_table
from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from reinforce.evaluation.reading import storage_errors
from reinforce.seeds import permutation, seed_for
from reinforce.source.formats.base import Shard
from reinforce.source.samples import RawSample
from reinforce.source.whole_reads import open_whole

HELD_OUT_FILE = "held-out.parquet"
_EVALUATED = 5000  # held-out images of a share, unless `evaluate.images` is set
_ROWS = 64  # of a row group

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Held-out images in the order in which they are evaluated, with their ``captions``.

    ``output`` is the folder of the file with the encoded images, which has the ``fingerprint``.
    """

    output: str
    fingerprint: str
    keys: Sequence[str]
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.keys)

    def images(self) -> Iterator[bytes]:
        """Read the encoded images in order. Raises UserError if the file is damaged, or was replaced."""
        store = Store(self.output)
        name = f"{store.url}/{HELD_OUT_FILE}"
        with (
            storage_errors(f"{name} cannot be read", "Delete it, and start the training again."),
            open_whole(store.fs, store.path(HELD_OUT_FILE)) as file,
        ):
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if (parquet.schema_arrow.metadata or {}).get(FINGERPRINT) != self.fingerprint.encode():
                raise UserError(f"{name} was replaced during the training. Start it again.")
            for group in range(parquet.num_row_groups):
                for image in parquet.read_row_group(group, columns=["image"])["image"]:
                    yield image.as_py()


class _Kept(NamedTuple):
    """An image, whose ``length`` bytes are at ``start`` of a temporary file; the highest ``place`` is the first one."""

    place: tuple[int, int]
    key: str
    captions: Sequence[str]
    start: int
    length: int


def load_held_out(config: CaptionerConfig, source: PairSource, shards: Sequence[Shard]) -> HeldOut:
    """Load the held-out images from the output, or collect them from ``held_out.source`` or else ``shards``.

    Raises UserError for fewer than two, and for shards that cannot be read completely.
    """
    own, most = config.held_out, config.evaluate.images
    if own.source is not None:
        source = PairSource("held_out", own.source, own.view, config.data, config.seed)
        shards = [shard for shard, _ in source.groups()]
    else:
        most = most or _EVALUATED
    store, fingerprint = Store(config.output), source.fingerprint(shards, str(most))
    table = read_table(store, HELD_OUT_FILE, fingerprint, ["key", "captions"])
    if table is None:
        _log.info("collecting the held-out images, which is done once")
        with tempfile.TemporaryFile() as images:
            kept = _collect(source, shards, most, images)
            if len(kept) < 2:
                raise UserError(
                    f"held_out: {len(kept)} images are held out, but evaluation needs at least two. Raise "
                    "held_out.share, or give held_out.source."
                )
            _write(store, kept, images, fingerprint)
        table = read_table(store, HELD_OUT_FILE, fingerprint, ["key", "captions"])
        assert table is not None
    return HeldOut(config.output, fingerprint, table["key"].to_pylist(), table["captions"].to_pylist())


def _collect(source: PairSource, shards: Sequence[Shard], most: int | None, images: IO[bytes]) -> list[_Kept]:
    """Collect at most ``most`` held-out images in a seeded order of their keys, and their bytes in ``images``."""
    kept: list[_Kept] = []  # a heap, the last one of the order first
    refused = Counter[str]()
    for number, (item, captions) in enumerate(_pairs(source, shards, most, refused)):
        assert isinstance(item, RawSample)
        place = -seed_for(source.seed, item.key, "sample"), -number
        if len(kept) == most and place < kept[0].place:
            continue
        push = heapq.heappushpop if len(kept) == most else heapq.heappush
        push(kept, _Kept(place, item.key, captions, images.tell(), images.write(item.image)))
    source.log_refused(refused)
    return sorted(kept, reverse=True)


def _pairs(source: PairSource, shards: Sequence[Shard], most: int | None, refused: Counter[str]) -> Iterator[Pair]:
    """The pairs of a source of held-out images, or the first ``most`` that are held out of a share."""
    share = source.share is not None
    order = permutation(len(shards), source.seed, "held out", 0).tolist() if share else range(len(shards))
    found = (pair for number in order for pair in source.pairs(shards[number], refused, held_out=share))
    return itertools.islice(found, most) if share else found


def _write(store: Store, kept: Sequence[_Kept], images: IO[bytes], fingerprint: str) -> None:
    schema = schemas.HELD_OUT.with_metadata({FINGERPRINT: fingerprint})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with store.new_file(HELD_OUT_FILE) as path, pq.ParquetWriter(path, schema, **options) as writer:
        for first in range(0, len(kept), _ROWS):
            rows = []
            for one in kept[first : first + _ROWS]:
                images.seek(one.start)
                rows.append({"key": one.key, "captions": one.captions, "image": images.read(one.length)})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
