"""An S3 server on a host of ``drills.soak.hosts``, and commands that put files there and read their digests.

``python -m drills.soak.object_store serve PORT`` until it is killed, ``put FOLDER PREFIX``, ``digests PREFIX``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from typing import Any

from tests.helpers.s3_proxy import s3_behind_proxy


def _files() -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def serve(port: str) -> None:
    with s3_behind_proxy("0.0.0.0", int(port)):
        threading.Event().wait()


def put(folder: str, prefix: str) -> None:
    store = _files()
    if not store.exists("bucket"):
        store.mkdir("bucket")
    store.put(folder, f"bucket/{prefix}", recursive=True)


def digests(prefix: str) -> None:
    """Print the SHA-256 of each object below a prefix, by its name, as one line of JSON."""
    store, root = _files(), f"bucket/{prefix}/"
    found = {name.removeprefix(root): hashlib.sha256(store.cat_file(name)).hexdigest() for name in store.find(root)}
    print(json.dumps(found))


if __name__ == "__main__":
    {"serve": serve, "put": put, "digests": digests}[sys.argv[1]](*sys.argv[2:])
