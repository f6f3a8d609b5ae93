"""One more source format, family of models and kind of layers, as users of the seams would write them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from reinforce.config import Config
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import SAMPLES, Content, Layer, LayerKind, Recorded, compute_fingerprint
from reinforce.engine.worker.inference import Batch, Outputs
from reinforce.engine.worker.producers.base import Producer, RowGroupTables
from reinforce.engine.worker.producers.registry import PRODUCERS
from reinforce.source.config import Input
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.samples import Item, Refusal, UnreadSample, make_sample
from reinforce.source.urls import open_stream
from schemas import Reason
from teachers.protocols import Captioner, Teacher
from teachers.registry import Family
from teachers.spec import CaptionerSpec, ModelInfo, TeacherSpec
from tests.helpers.models import ColorTeacher, SeedCaptioner

BRIGHTNESS = "measures/brightness"
_MAGIC = b"RECORDS\n"


class Records(SourceFormat):
    """Files of length-prefixed records, each with a key, a caption and an image."""

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


class PaletteTeacherSpec(TeacherSpec):
    """A family with a key."""

    colors: int = Field(8, ge=1)

    def describe(self) -> ModelInfo:
        identity = {"family": self.family, "colors": self.colors, "precision": self.resolved_precision}
        return ModelInfo(self.colors, images=True, texts=True, identity=identity)

    def hosts(self) -> Iterator[str]:
        yield f"palettes.example ({self.model})"

    def load(self, name: str, device: str) -> Teacher:
        return ColorTeacher(torch.device("cpu"), dim=self.colors)  # type: ignore[return-value]


class PaletteCaptionerSpec(CaptionerSpec):
    uses_precision: ClassVar[bool] = False

    def describe(self) -> ModelInfo:
        return ModelInfo(None, images=True, texts=False, identity={"family": self.family, "captions": self.captions})

    def load(self, name: str, device: str) -> Captioner:
        return SeedCaptioner(torch.device("cpu"), self.captions)  # type: ignore[return-value]


PALETTE = Family(f"{__name__}:PaletteTeacherSpec", f"{__name__}:PaletteCaptionerSpec")


class Brightness(LayerKind):
    """The mean brightness of each image's first crop, one number a sample."""

    name = "brightness"
    pattern = BRIGHTNESS
    level = 1
    columns = ("key", "value")
    values = "value"
    unit = "images"
    crops = True
    file_schemas = (pa.schema([pa.field("key", pa.string(), False), pa.field("value", pa.float32())]),)

    def __reduce__(self) -> Any:
        return register, ()  # a worker that receives its layers knows the kind from then on

    def layers(self, config: Config, infos: Mapping[Any, Any], known: Mapping[str, Layer]) -> Iterable[Layer]:
        recipe = self._recipe(known[SAMPLES].fingerprint)
        yield Layer(BRIGHTNESS, self, compute_fingerprint(recipe), (SAMPLES,), recipe=recipe, sees="crops")

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        return 4

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        return Recorded(compute_fingerprint(self._recipe(manifest["layers"][SAMPLES]["fingerprint"])), {}, {})

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        values = np.array(self.decode(table), np.float32)
        yield "are not between 0 and 255", (values < 0) | (values > 255)

    def content(self, layer: Layer) -> Content:
        return Content("mean of the first crop")

    @staticmethod
    def _recipe(samples: str) -> dict[str, Any]:
        return {"samples": samples, "brightness": 1}


class BrightnessProducer(Producer):
    kind = "brightness"
    crops = True

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        [layer] = self.layers
        first = batch.crops.unflatten(0, (len(batch.rows), -1))[:, 0]
        with self.session.stage(layer.name, batch.what, len(batch.rows)):
            means = first.float().mean(dim=(1, 2, 3))
        return lambda: {layer.name: means.cpu().numpy()}

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        self.refuse_unreadable(layer, group)
        readable = np.array([row.unreadable is None for row in group.rows])
        values = pa.array(np.concatenate(group.outputs(layer.name)), pa.float32(), mask=~readable)
        return pa.table([pa.array(group.keys, pa.string()), values], schema=self.schema(layer))


def register() -> Brightness:
    """Add the kind and its producer to the registries."""
    kind = KINDS.setdefault(Brightness.name, Brightness())
    PRODUCERS.setdefault(Brightness.name, BrightnessProducer)
    assert isinstance(kind, Brightness)
    return kind
