"""One more source format, for tests: files of length-prefixed records, each with a key, a caption and an image."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

from reinforce.input_config import Input
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.formats.columns import make_sample
from reinforce.source.samples import Item, Refusal, UnreadSample
from reinforce.source.streams import open_stream
from schemas import Reason

_MAGIC = b"RECORDS\n"


class Records(SourceFormat):
    name = "records"
    noun = "records file"
    endings = (".records",)

    def recognises(self, head: bytes) -> bool:
        return head.startswith(_MAGIC)

    def items(self, shard: Shard, spec: Input) -> Iterator[Item]:
        with open_stream(shard.url) as (stream, _):
            content = io.BytesIO(stream.read(2**30))
        content.seek(len(_MAGIC))
        while header := content.read(12):
            sizes = struct.unpack(">3I", header)
            key, caption, image = (content.read(size) for size in sizes)
            if len(image) < sizes[2]:
                yield Refusal(None, Reason.SHARD_DAMAGED, f"it ends inside the record {key.decode()}")
                return
            yield make_sample(UnreadSample(key.decode(), "", {"txt": caption}, {}, ()), image, spec.limits)


def write_records(path: Path, records: list[tuple[str, str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [(key.encode(), caption.encode(), image) for key, caption, image in records]
    path.write_bytes(_MAGIC + b"".join(struct.pack(">3I", *map(len, each)) + b"".join(each) for each in parts))
    return path


FORMAT = Records()
