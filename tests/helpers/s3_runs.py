"""Four small shards in S3, and what runs write there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import s3fs

from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.s3_proxy import Request

SHARDS = 4


def put_source(s3: s3fs.S3FileSystem, folder: Path) -> None:
    for shard in range(SHARDS):
        s3.put_file(str(write_tar(folder / f"{shard}.tar", members_of(shard, 8))), f"bucket/source/{shard}.tar")


def config(output: str, **changes: Any) -> dict[str, Any]:
    changes = {"captioners": {}, "workers": {"batch": 16, "max": 1}, **changes}
    return config_of(f"s3://bucket/source/{{0..{SHARDS - 1}}}.tar", f"s3://bucket/{output}", **changes)


def layers(s3: s3fs.S3FileSystem, output: str) -> dict[str, bytes]:
    """All objects of a dataset except those in runs/."""
    root = f"bucket/{output}/"
    s3.invalidate_cache()
    names = [path.removeprefix(root) for path in s3.find(root)]
    return {name: s3.cat_file(root + name) for name in names if not name.startswith(("runs/", "index/"))}


def events(s3: s3fs.S3FileSystem, output: str, kind: str) -> list[dict[str, Any]]:
    s3.invalidate_cache()
    paths = s3.glob(f"bucket/{output}/runs/*/events-*.jsonl")
    lines = [line for path in sorted(paths) for line in s3.cat_file(path).splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def reads_shard(request: Request, *shards: int) -> bool:
    """Whether it reads the bytes of one of these source shards, or of any."""
    return request.is_read and request.key in {f"bucket/source/{shard}.tar" for shard in shards or range(SHARDS)}


def writes_layer(request: Request) -> bool:
    """Whether it writes a layer's file."""
    return request.method == "PUT" and request.key.endswith(".parquet") and "/quarantine/" not in request.key
