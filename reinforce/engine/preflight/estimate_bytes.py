"""Estimated bytes of what a plan will write: from committed files, else from the beginning of a source shard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from reinforce.config import Config
from reinforce.dataset.codecs.registry import CODECS, find_codec
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.manifest.manifest import find_manifest
from reinforce.engine.plan.plan import Plan
from reinforce.source.formats.base import Shard
from reinforce.source.formats.recognise import find_format
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample
from reinforce.source.urls import filesystem
from reinforce.terminal import format_bytes

_READ_BYTES = 8 * 2**20
_READ_SAMPLES = 2000
_READ_FILES = 32  # images in files of their own
_REFERENCE_BYTES = 24  # per image
_RECORD_BYTES = 6  # per augmentation record, dictionary-encoded and compressed from 54


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of a source, by its first samples."""

    rows: float  # per shard
    image_bytes: float  # per row
    text_bytes: float  # per row


def expected_bytes(plan: Plan, statistics: SourceStatistics | None = None) -> dict[str, int | None]:
    """Bytes still to be written, by layer; None if they cannot be estimated. ``statistics`` are read if not given."""
    statistics = statistics or source_statistics(plan)
    dims = _recorded_dims(plan)
    sizes: dict[str, int | None] = {}
    for name, layer in plan.layers.items():
        state = plan.states[name]
        per_shard: float | None = None
        if state.missing == 0:
            per_shard = 0
        elif state.done:
            per_shard = state.done_bytes / state.done
        elif statistics is not None:
            known = replace(layer, dim=layer.dim or dims.get(layer.owner))
            image = statistics.image_bytes if plan.config.embeds_images else _REFERENCE_BYTES
            records = _RECORD_BYTES * plan.config.augmentations.count
            row = known.kind.row_bytes(known, image + statistics.text_bytes + records)  # None before it is loaded
            per_shard = None if row is None else statistics.rows * row
        sizes[name] = None if per_shard is None else round(per_shard * state.missing)
    return sizes


def bytes_by_codec(plan: Plan, statistics: SourceStatistics | None) -> dict[str, dict[str, int]]:
    """Bytes of the missing vectors of each teacher by codec, that of the config first; none without ``statistics`` or
    where the dimension is not known before the model is loaded."""
    dims, found = _recorded_dims(plan), dict[str, dict[str, int]]()
    if statistics is None:
        return found
    for name, layer in plan.layers.items():
        dim, missing = layer.dim or dims.get(layer.owner), plan.states[name].missing
        if not layer.kind.vectors or not dim or not missing:
            continue
        sizes = found.setdefault(str(layer.model), {})
        for codec in dict.fromkeys([layer.dtype, *(one for sort in CODECS for one in sort.choices(dim))]):
            size = layer.count * find_codec(codec).bytes(dim)
            sizes[codec] = sizes.get(codec, 0) + round(statistics.rows * missing * size)
    return found


def plan_table(plan: Plan, expected: Mapping[str, int | None]) -> Table:
    """A plan as a table: what is done, missing and quarantined per layer, and the bytes to expect."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", "done", "missing", "quarantined", "expected"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for name, state in plan.states.items():
        size = expected[name]
        text = "?" if size is None else format_bytes(size)
        table.add_row(name, f"{state.done:,}", f"{state.missing:,}", f"{state.quarantined:,}", text)
    return table


def _recorded_dims(plan: Plan) -> dict[tuple[str | None, str | None], int | None]:
    """Dimensions of the models that an earlier run loaded, from dataset.json, by section and name."""
    entries = (find_manifest(Store(plan.config.output)) or {}).get("layers", {})
    stored = (stored_layer(name, entry) for name, entry in entries.items())
    return {layer.owner: layer.dim for layer in stored if layer.dim and layer.kind.vectors}


def source_statistics(plan: Plan) -> SourceStatistics | None:
    """Statistics of the first few megabytes of the first shard that can be read; None if none of three can, or if
    nothing is missing."""
    for shard in plan.pending[:3]:
        try:
            found = _statistics(plan.shard(shard), plan.config)
        except Exception:  # noqa: S112 - each driver has its own; the plan reports why its sizes are unknown
            continue
        if found is not None:
            return found
    return None


def expected_samples(plan: Plan) -> float | None:
    """Samples of the shards that lack something, by little reading; None if their number is not known without more."""
    parts = [shard.part for shard in plan.pending]
    if all(part is not None for part in parts):
        return sum(part.rows for part in parts if part is not None)
    format_ = find_format(plan.pending[0].format)
    if format_.is_table and not format_.has_offsets:
        return None
    statistics = source_statistics(plan)
    return None if statistics is None else statistics.rows * len(plan.pending)


def _statistics(shard: Shard, config: Config) -> SourceStatistics | None:
    samples: list[RawSample] = []
    seen, whole = 0, True
    has_offsets = find_format(shard.format).has_offsets
    for item in itertools.islice(read_samples(shard, config.input), _READ_SAMPLES):
        if isinstance(item, RawSample):
            samples.append(item)
            seen = item.offset + item.length if has_offsets else seen + item.length
        if seen > _READ_BYTES or (samples and samples[-1].url and len(samples) == _READ_FILES):
            whole = False
            break
    if not samples:
        return None
    rows = len(samples) if whole else _rows(shard, samples, seen)
    if rows is None:
        return None
    image = sum(item.length for item in samples) / len(samples)
    text = sum(len(json.dumps(v.decode("utf-8", "replace"))) for i in samples for v in i.sidecars.values())
    return SourceStatistics(rows, image, 0.5 * text / len(samples))


def _rows(shard: Shard, samples: Sequence[RawSample], seen: int) -> float | None:
    """Estimated rows of a shard, from its first samples of ``seen`` bytes; None if unknown."""
    if find_format(shard.format).is_listed:
        return len(shard.lines())
    if shard.part is not None:
        return shard.part.rows
    if samples[-1].url is not None:
        return None
    fs, path = filesystem(shard.url)
    return int(fs.size(path) or 0) / max(1, seen) * len(samples)
