"""One Ray for the whole session: it takes seconds to start."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from tests.storage.proxy import Proxy

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else tests at the same time starve those that wait for workers


def free_port() -> int:
    """A port above the range that Ray gives to workers (10002 to 19999)."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        if port > 20_000:
            return port


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Proxy]:
    """What stands before an S3 that stays for the session: moto's server does not let go of its port when it stops."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(0, server.get_host_and_port()[1])
    yield proxy
    proxy.close()
    server.stop()


@pytest.fixture(scope="session")
def s3_server(s3_proxy: Proxy) -> str:
    """The endpoint of the S3, for the tests and for the workers of their Ray."""
    return s3_proxy.url


def _as_users_name_it(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "k")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:  # the workers' environment is that of the first ray.init
        _as_users_name_it(patch, s3_server)
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3(s3_server: str) -> Iterator[Any]:
    """An S3 with an empty bucket, named in the environment as users name theirs."""
    import s3fs

    with urlopen(Request(f"{s3_server}/moto-api/reset", method="POST")):
        pass
    with pytest.MonkeyPatch.context() as patch:
        _as_users_name_it(patch, s3_server)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(use_listings_cache=False)  # others change what is there
        fs.mkdir("bucket")
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def picture(seed: int, width: int = 40, height: int = 30, format_: str = "PNG") -> bytes:
    """A drawn picture: coloured noise over a gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
    pixels = (ramp + rng.random((height, width, 3)) * 50).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format_)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(shard: int, count: int, **picture_options: Any) -> list[tuple[str, bytes]]:
    """``count`` samples in img2dataset's layout."""
    members = []
    for i in range(count):
        key = f"{shard:03d}{i:05d}"
        members.append((f"{key}.png", picture(shard * 10_000 + i, **picture_options)))
        members.append((f"{key}.txt", f"thing {i} of shard {shard}".encode()))
        members.append((f"{key}.json", json.dumps({"uid": key, "url": f"https://example.org/{key}"}).encode()))
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Writes shards of the given sizes and returns their glob."""

    def write(*sizes: int, folder: str = "source") -> str:
        for shard, size in enumerate(sizes):
            write_tar(tmp_path / folder / f"{shard:05d}.tar", members_of(shard, size))
        return f"{tmp_path}/{folder}/*.tar"

    return write


def config_of(source: str, output: Path | str, **changes: Any) -> dict[str, Any]:
    """A config with two small teachers of the user's own kind and a captioner."""
    config: dict[str, Any] = {
        "source": source,
        "output": str(output),
        "augmentations": {"count": 2, "size": 24},
        "captioners": {"namer": {"class": "tests.models:Namer", "captions": 2}},
        "teachers": {
            "red": {"class": "tests.models:Colour", "options": {"size": 16, "dim": 8}, "logit_scale": 50.0},
            "blue": {"class": "tests.models:Colour", "options": {"size": 24, "dim": 12, "seed": 1}},
        },
        "workers": {"batch": 16, "max": 1},
        "failures": {"allowed_share": 1.0},
    }
    return {**config, **changes}


def tree(folder: Path, layers_only: bool = True) -> dict[str, bytes]:
    """Relative path -> bytes of a dataset's files."""
    skipped = ("runs/", ".tmp/") if layers_only else ()
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(skipped)}
