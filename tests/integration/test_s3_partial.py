"""A file that is too large for one PUT appears as a whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import s3fs

from reinforce.dataset.files.store import Store
from reinforce.errors import StorageError
from tests.helpers.s3_proxy import Proxy, Request, hold, refuse

ROOT = Path(__file__).parents[2]
BYTES = 101 * 2**20  # from 100 MiB s3fs uploads parts of 50 MiB


def write(folder: str) -> None:
    with Store(f"s3://bucket/{folder}").new_file("large.bin") as path, open(path, "wb") as file:
        file.truncate(BYTES)


def second_part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber=2" in request.query


def uploads(s3: s3fs.S3FileSystem, folder: str) -> int:
    """Number of unfinished multipart uploads."""
    listed = s3.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])
    return sum(upload["Key"].startswith(folder) for upload in listed)


def test_a_process_killed_in_the_middle_of_an_upload_leaves_no_object(s3: s3fs.S3FileSystem, s3_proxy: Proxy) -> None:
    code = "from tests.integration.test_s3_partial import write; write('killed')"
    with s3_proxy.inject(hold, second_part) as reached:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while not reached:
            assert process.poll() is None, "it ended before its second part"
        process.kill()
        process.wait()
    assert s3.find("bucket/killed", refresh=True) == []
    assert uploads(s3, "killed") == 1, "its parts cost money until a lifecycle rule removes them: see docs/clusters.md"


def test_a_process_killed_while_it_puts_a_file_leaves_none_on_its_machine(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, tmp_path: Path
) -> None:
    code = "from reinforce.dataset.files.store import Store; Store('s3://bucket/put').write_bytes(b'whole', 'file')"
    with s3_proxy.inject(hold, lambda request: request.method == "PUT") as reached:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
        while not reached:
            assert process.poll() is None, "it ended before its request"
        process.kill()
        process.wait()
    assert [*tmp_path.iterdir()] == []
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert s3.cat("bucket/put/file") == b"whole"


def test_an_error_in_the_middle_of_an_upload_leaves_no_object(s3: s3fs.S3FileSystem, s3_proxy: Proxy) -> None:
    with (
        s3_proxy.inject(refuse(400, "InvalidPart"), second_part),
        pytest.raises(StorageError, match=r"bucket/failed/large\.bin cannot be written: OSError"),
    ):
        write("failed")
    assert s3.find("bucket/failed", refresh=True) == []
    assert uploads(s3, "failed") == 0
