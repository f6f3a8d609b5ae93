"""What a plan will write, in bytes: from the files that are there, else from a look at the first shard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from reinforce.engine.plan import Plan
from reinforce.source.shards import RawSample, read_shard
from reinforce.source.urls import filesystem
from reinforce.terminal import format_bytes

_LOOK_BYTES = 8 * 2**20
_RECORD_BYTES = 6  # an augmentation record, encoded by dictionary and compressed; 54 are its values
_CAPTION_BYTES = 20  # compressed


@dataclass(frozen=True)
class _Glimpse:
    rows: float  # per shard
    image_bytes: float  # per row
    text_bytes: float  # per row


def expected_bytes(plan: Plan) -> dict[str, int | None]:
    """Bytes still to be written, by layer; None where nothing lets one tell."""
    glimpse = _glimpse(plan) if plan.pending else None
    rows = glimpse.rows if glimpse else None
    sizes: dict[str, int | None] = {}
    for name, layer in plan.layers.items():
        state = plan.states[name]
        per_shard: float | None = None
        if state.missing == 0:
            per_shard = 0
        elif state.done:
            per_shard = state.done_bytes / state.done
        elif rows is not None and glimpse is not None:
            if layer.kind == "samples":
                image = glimpse.image_bytes if plan.config.embeds_images else 24
                per_shard = rows * (image + glimpse.text_bytes + _RECORD_BYTES * plan.config.augmentations.count)
            elif layer.kind == "captions":
                per_shard = rows * layer.count * _CAPTION_BYTES
            elif layer.row_bytes is not None:
                per_shard = rows * layer.row_bytes
        sizes[name] = None if per_shard is None else round(per_shard * state.missing)
    return sizes


def plan_table(plan: Plan, expected: Mapping[str, int | None]) -> Table:
    """A plan as a table: per layer what is there, what is missing, and how much it will be."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", "done", "missing", "quarantined", "expected"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for name, state in plan.states.items():
        size = expected[name]
        text = "?" if size is None else format_bytes(size)
        table.add_row(name, f"{state.done:,}", f"{state.missing:,}", f"{state.quarantined:,}", text)
    return table


def _glimpse(plan: Plan) -> _Glimpse | None:
    """Rows a shard and bytes a row, from the first few megabytes of the first shard that can be read."""
    for shard in plan.pending[:3]:
        try:
            fs, path = filesystem(shard.url)
            size = int(fs.size(path) or 0)
            samples, seen = [], 0
            for item in itertools.islice(read_shard(shard.url, plan.config.input.limits), 2000):
                if isinstance(item, RawSample):
                    samples.append(item)
                    seen = item.offset + item.length
                if seen > _LOOK_BYTES:
                    break
        except Exception:  # noqa: S112 - each driver has its own; whoever asks for more than sizes is told
            continue
        if not samples:
            continue
        image = sum(item.length for item in samples) / len(samples)
        text = sum(len(json.dumps(v.decode("utf-8", "replace"))) for i in samples for v in i.sidecars.values())
        return _Glimpse(size / max(1, seen) * len(samples), image, 0.5 * text / len(samples))
    return None
