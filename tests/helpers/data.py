"""Small images, shards and configs for tests."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.images import encode


def free_port() -> int:
    """Return a free port that neither Ray's workers (10002 to 19999) nor connections (from 32768 on) take."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@functools.lru_cache(1000)
def picture(seed: int, width: int = 40, height: int = 30, format_: str = "PNG") -> bytes:
    """An encoded image of coloured noise over a gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
    pixels = (ramp + rng.random((height, width, 3)) * 50).astype(np.uint8)
    return encode(Image.fromarray(pixels), format_)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(shard: int, count: int, **picture_options: Any) -> list[tuple[str, bytes]]:
    """The members of ``count`` samples in the layout of img2dataset."""
    members = []
    for i in range(count):
        key = f"{shard:03d}{i:05d}"
        members.append((f"{key}.png", picture(shard * 10_000 + i, **picture_options)))
        members.append((f"{key}.txt", f"thing {i} of shard {shard}".encode()))
        members.append((f"{key}.json", json.dumps({"uid": key, "url": f"https://example.org/{key}"}).encode()))
    return members


def config_of(source: str, output: Path | str, **changes: Any) -> dict[str, Any]:
    """A config with two small custom teachers and a captioner."""
    config: dict[str, Any] = {
        "source": source,
        "output": str(output),
        "augmentations": {"count": 2, "size": 24},
        "captioners": {"namer": {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}},
        "teachers": {
            "red": {
                "class": "tests.helpers.models:ColorTeacher",
                "options": {"size": 16, "dim": 8},
                "logit_scale": 50.0,
            },
            "blue": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 24, "dim": 12, "seed": 1}},
        },
        "workers": {"batch": 16, "max": 1},
        "failures": {"allowed_share": 1.0},
    }
    return {**config, **changes}


def config_of_tar(folder: Path, members: list[tuple[str, bytes]], **changes: Any) -> dict[str, Any]:
    """Write a tar, and return a config that reads it."""
    return config_of(str(write_tar(folder / "source" / "0.tar", members)), folder / "out", **changes)


def events_of(dataset: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind of all runs of a dataset, in their order."""
    lines = [line for part in sorted(dataset.glob("runs/*/events-*.jsonl")) for line in part.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def tree(folder: Path, layers_only: bool = True) -> dict[str, bytes]:
    """Return the bytes of a dataset's files by relative path; by default without what only runs need."""
    skipped = ("runs/", ".tmp/", "index/", "set-aside/") if layers_only else ()
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(skipped)}
