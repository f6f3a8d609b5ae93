"""A dataset of the size of DFN-5B in an object store: each shard has the files of one small shard."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.scale.object_store import Content
from reinforce.config import Config, load_config
from reinforce.dataset.index import FileEntry, LayerIndex, write_index
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.manifest import update_manifest
from reinforce.dataset.runs import RunProgress
from reinforce.dataset.store import MANIFEST, LayerWriter, Store
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.source.urls import shard_names
from schemas import Reason

CONFIG = Path(__file__).parents[2] / "configs" / "dfn5b.yaml"
#: Shards of DFN-5B.
DFN5B = 190_735
DIM = 768
_ROWS = 2


def overrides(shards: int) -> list[str]:
    """What replaces the source and the output of the config."""
    return [f"source=s3://bucket/dfn5b/{{00000000..{shards - 1:08d}}}.tar", "output=s3://bucket/data"]


def make_content(shards: int, seconds: float, missing: int = 0, quarantined: int = 0) -> Content:
    """The dataset of configs/dfn5b.yaml with so many shards, of which the last ``missing`` are not finished.

    ``quarantined`` of these are quarantined. Each request takes ``seconds``.
    """
    config = load_config(CONFIG, overrides(shards))
    layers = build_layers(config, describe_models(config))
    names = shard_names([f"s3://bucket/dfn5b/{number:08d}.tar" for number in range(shards)])
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        files = {name: _layer_file(store, config, layer) for name, layer in layers.items()}
        for name in names[shards - missing :][:quarantined]:
            store.quarantine(SAMPLES, name, [(None, Reason.SHARD_MISSING, "no such file")])
        store.write_json(update_manifest(None, config, layers, _loaded(config), layers), MANIFEST)
        for name, layer in layers.items():
            entries = dict.fromkeys(names[: shards - missing], FileEntry(len(files[name]), (_ROWS,)))
            index = LayerIndex().merged(entries, groups=name == SAMPLES)
            write_index(store, name, layer.fingerprint, index)
        kept = [path for path in Path(folder).rglob("*") if path.is_file() and _is_object(path.relative_to(folder))]
        objects = {f"data/{path.relative_to(folder)}": path.read_bytes() for path in kept}
    return Content(names, dict.fromkeys(layers, shards - missing), files, objects, seconds=seconds)


def write_shards(output: Path, shards: int) -> None:
    """Write the dataset of configs/dfn5b.yaml with so many shards, each with keys of its own."""
    config = load_config(CONFIG, [*overrides(shards)[:1], f"output={output}"])
    layers = build_layers(config, describe_models(config))
    store = Store(str(output))
    store.write_json(update_manifest(None, config, layers, _loaded(config), layers), MANIFEST)
    urls = [f"s3://bucket/dfn5b/{number:08d}.tar" for number in range(shards)]
    for name, url in zip(shard_names(urls), urls, strict=True):
        for layer in layers.values():
            _write_layer(store, config, layer, name, url)


def running_job(shards: int, workers: int) -> dict[str, bytes]:
    """The progress of a run whose workers have two shards each."""
    now = time.time()
    stage = {"leased": now - 60, "stage": "embeddings/dfn2b/images", "what": "256 rows, keys 'a' to 'b'", "since": now}
    states = [
        {
            "worker": number,
            "host": f"node-{number // 8}",
            "pid": number,
            "log": "/tmp/ray/session_2026-11-26/logs/worker-0123456789abcdef.err",  # noqa: S108 - not opened
            "shards": [{**stage, "shard": f"{2 * number + n:08d}-0123456789"} for n in range(2)],
        }
        for number in range(workers)
    ]
    progress = RunProgress.model_validate(
        {
            "run": "r", "time": now, "interval": 60.0, "started": now, "host": "head", "pid": 1, "shards": shards,
            "shards_done": shards // 2, "samples": 10**9, "workers": states,
        }
    )  # fmt: skip
    return {"data/runs/r/progress.json": progress.model_dump_json().encode()}


def write_manifest(output: Path, config: Path) -> None:
    """Write the dataset.json of a config into a folder."""
    parsed = load_config(config)
    layers = build_layers(parsed, describe_models(parsed))
    Store(str(output)).write_json(update_manifest(None, parsed, layers, _loaded(parsed), layers), MANIFEST)


def _is_object(path: Path) -> bool:
    return path.parts[0] in ("index", "quarantine", MANIFEST)


def _loaded(config: Config) -> Mapping[tuple[str, str], Mapping[str, Any]]:
    return {("teachers", name): {"dim": DIM} for name in config.teachers}


def _layer_file(store: Store, config: Config, layer: Layer) -> bytes:
    """A file of the layer."""
    _write_layer(store, config, layer, "shard", "s3://bucket/dfn5b/00000000.tar")
    return Path(store.layer_path(layer.name, "shard")).read_bytes()


def _write_layer(store: Store, config: Config, layer: Layer, shard: str, url: str) -> None:
    """Write a file with the keys of its rows, and nothing else in them."""
    schema = layer.schema(config.images, DIM)
    with LayerWriter(store, layer, schema, shard, url) as writer:
        writer.write(pa.table([_column(field, shard) for field in schema], schema=schema))
        writer.commit()


def _column(field: pa.Field, shard: str) -> pa.Array:
    if field.name == "key":
        return pa.array([f"{shard}-{row}" for row in range(_ROWS)], field.type)
    if field.nullable:
        return pa.nulls(_ROWS, field.type)
    return pa.array([_empty(field.type)] * _ROWS, field.type)


def _empty(type_: pa.DataType) -> Any:
    if pa.types.is_struct(type_):
        return {type_.field(i).name: _empty(type_.field(i).type) for i in range(type_.num_fields)}
    return [] if pa.types.is_list(type_) else "" if pa.types.is_string(type_) else 0


def environment(address: str) -> dict[str, str]:
    """Variables with which s3fs uses the store at an address."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "reinforce",
        "AWS_SECRET_ACCESS_KEY": json.dumps("no secret"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
