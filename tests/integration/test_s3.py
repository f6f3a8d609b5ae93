"""An object store (moto's server): faults that pass or last, and files that are put in parts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
import s3fs

import reinforce
from reinforce.dataset.store import Store
from reinforce.engine.record import RunSummary
from reinforce.errors import StorageError
from reinforce.processes.attempts import BOTOCORE_REQUESTS, S3FS_REQUESTS, Attempts
from reinforce.source import urls
from tests.helpers.data import members_of
from tests.helpers.large_object import write
from tests.helpers.reinforced import fresh_dataset
from tests.helpers.s3_proxy import Fault, Proxy, Request, cut, hold, lose, refuse, run_first, slow
from tests.helpers.s3_runs import SHARDS, config, events, layers, put_source, reads_shard, writes_layer
from tests.helpers.tars import tar_bytes

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def undisturbed(s3: s3fs.S3FileSystem, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    put_source(s3, tmp_path_factory.mktemp("source"))
    fresh_dataset(config("undisturbed"))
    made = layers(s3, "undisturbed")
    assert len(made) == 5 * SHARDS + 1
    return made


@pytest.mark.slow
def test_each_layer_is_listed_at_the_start_and_at_the_end_of_a_run(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, undisturbed: dict[str, bytes]
) -> None:
    folders = {name.rpartition("/")[0] for name in undisturbed} - {""}
    s3_proxy.requests.clear()
    assert reinforce.run(config("listed")).status == 0
    listed = Counter(request.prefix for request in s3_proxy.requests if request.is_list)
    assert {name: listed[f"listed/{name}/"] for name in folders} == dict.fromkeys(folders, 2)
    assert layers(s3, "listed") == undisturbed

    s3_proxy.requests.clear()
    assert reinforce.run(config("listed")).run is None
    listed = Counter(request.prefix for request in s3_proxy.requests if request.is_list)
    layer = {f"listed/{name}/": 1 for name in folders}
    quarantine = {f"listed/quarantine/{name}/": 1 for name in folders}
    assert listed == {**layer, **quarantine}


def has_begun(proxy: Proxy) -> bool:
    """Whether a worker has started, before which the source is looked at."""
    return any(request.method == "PUT" and request.key.endswith("dataset.json") for request in proxy.requests)


@pytest.mark.usefixtures("ray_session")
def test_transient_faults_leave_no_trace(s3: s3fs.S3FileSystem, s3_proxy: Proxy, undisturbed: dict[str, bytes]) -> None:
    """Several kinds of faults in one run."""
    real = s3.cat_file("bucket/source/1.tar")
    other = tar_bytes(members_of(9, 8))
    s3.pipe_file("bucket/source/1.tar", other)
    faults: list[tuple[Fault, Callable[[Request], bool], int]] = [
        # The object changes between the requests for its length and for its bytes.
        (run_first(lambda: s3.pipe_file("bucket/source/1.tar", real)), lambda r: reads_shard(r, 1), 1),
        (refuse(503, "SlowDown", "Please reduce your request rate."), lambda r: reads_shard(r, 0), 3),
        (cut, reads_shard, 2),
        (slow(0.1), reads_shard, 2),
        # Two shards are in flight, and each of their files is put four times in one attempt.
        (refuse(500, "InternalError"), writes_layer, 2 * BOTOCORE_REQUESTS.count),
        (refuse(503, "SlowDown"), lambda r: r.key.startswith("bucket/passing"), 3),
        (refuse(403, "ExpiredToken"), lambda r: r.method == "PUT" and r.key == "bucket/passing/dataset.json", 1),
        (
            refuse(403, "ExpiredToken", "The provided token has expired."),
            lambda r: r.method == "PUT" and r.key.startswith("bucket/passing/.tmp/"),
            1,
        ),
        (refuse(403, "AccessDenied"), lambda r: r.key.startswith("bucket/passing/index/"), 1),
        (lose, lambda r: r.method == "PUT" and r.key == "bucket/passing/dataset.json", 1),
        (lose, lambda r: r.method == "PUT" and r.key.startswith("bucket/passing/embeddings/blue/images/"), 1),
        (refuse(403, "ExpiredToken"), lambda r: reads_shard(r, 2) and has_begun(s3_proxy), 2),
        (refuse(404, "NoSuchKey"), lambda r: reads_shard(r, 3) and has_begun(s3_proxy), 1),
    ]
    s3_proxy.requests.clear()
    with contextlib.ExitStack() as stack:
        done = [stack.enter_context(s3_proxy.inject(*fault)) for fault in faults]
        summary = reinforce.run(config("passing"))
    assert [len(affected) for affected in done] == [times for _, _, times in faults], "each fault was injected"
    assert (summary.status, summary.quarantined_shards, summary.refused) == (0, 0, {})
    raised = "".join(event["error"] for event in events(s3, "passing", "shard_raised"))
    assert "s3://bucket/source/1.tar has changed while it was read" in raised
    assert "cannot be written: OSError" in raised
    assert len(s3.ls("bucket/passing/runs")) == 2, "what the storage has lost is computed again"
    assert layers(s3, "passing") == undisturbed


@pytest.mark.slow
def test_two_runs_at_once_put_equal_objects(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, undisturbed: dict[str, bytes]
) -> None:
    s3_proxy.requests.clear()
    done: list[RunSummary] = []
    runs = [Thread(target=lambda: done.append(reinforce.run(config("twice")))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(600)
    assert [summary.status for summary in done] == [0, 0]
    assert layers(s3, "twice") == undisturbed
    puts = Counter(request.key for request in s3_proxy.requests if writes_layer(request))
    assert max(puts.values()) >= 2, "both wrote the same shards"


@pytest.mark.usefixtures("ray_session")
def test_shards_that_cannot_be_read_are_quarantined_and_their_neighbours_finish(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, undisturbed: dict[str, bytes]
) -> None:
    gone = s3.cat_file("bucket/source/0.tar")
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: s3.pipe_file("bucket/source/0.tar", gone))
        vanish = run_first(lambda: s3.rm_file("bucket/source/0.tar"))
        stack.enter_context(s3_proxy.inject(vanish, lambda r: reads_shard(r, 0), 1))
        never = stack.enter_context(s3_proxy.inject(refuse(503, "SlowDown"), lambda r: r.key == "bucket/source/1.tar"))
        stack.enter_context(s3_proxy.inject(refuse(403, "AccessDenied"), lambda r: reads_shard(r, 2)))
        failures = {"attempts": 1, "allowed_share": 1.0, "outage_seconds": 6}
        with pytest.raises(StorageError, match=r"So the storage failed for 1 shard, such as 1-.* None is quarantined"):
            reinforce.run(config("lasting", failures=failures))
    assert len(never) % BOTOCORE_REQUESTS.count == 0
    store = Store("s3://bucket/lasting")
    found = {
        shard.partition("-")[0]: [(row["reason"], row["key"]) for row in store.quarantined("samples", shard)]
        for shard in store.shards("quarantine/samples")
    }
    assert found == {"0": [("shard_missing", None)], "2": [("shard_unreadable", None)]}
    assert [name.partition("-")[0] for name in store.shards("embeddings/red/caption")] == ["3"]
    # The storage works again.
    assert reinforce.run(config("lasting"), retry_quarantined=True).status == 0
    assert layers(s3, "lasting") == undisturbed


def test_an_output_that_refuses_files_is_one_clear_error(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, undisturbed: dict[str, bytes]
) -> None:
    refused = refuse(403, "AccessDenied", "not for you")
    with (
        s3_proxy.inject(refused, lambda r: r.method == "PUT" and r.key.endswith(".parquet")) as tried,
        pytest.raises(reinforce.UserError) as raised,
    ):
        reinforce.run(config("refused", failures={"outage_seconds": 0}))
    message = str(raised.value)
    assert "cannot be written: PermissionError: not for you; check the storage" in message
    assert message.endswith("Finished shards are kept. Run the same command again to resume.")
    assert 3 <= len(tried) <= 2 * SHARDS + 1
    assert events(s3, "refused", "worker_replaced") == [], "a storage error is not the worker's fault"
    assert [name for name in layers(s3, "refused") if name != "dataset.json"] == []
    assert message.startswith(events(s3, "refused", "end")[0]["message"])


def test_wrong_credentials_are_one_clear_error(s3: s3fs.S3FileSystem, s3_server: str) -> None:
    def check_credentials_after(requests: str) -> None:
        url, headers = f"{s3_server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urlopen(HttpRequest(url, requests.encode(), headers, method="POST")).close()

    check_credentials_after("0")
    began = time.monotonic()
    try:
        with pytest.raises(
            reinforce.UserError, match=r"output s3://bucket/x cannot be written: PermissionError: .*exist"
        ):
            reinforce.run(config("x"))
    finally:
        check_credentials_after("inf")
    assert time.monotonic() - began < 120, "credentials are not retried, which takes three minutes"


def test_an_endpoint_that_does_not_answer_is_one_clear_error(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "BOTOCORE_REQUESTS", Attempts(2))
    fs, _ = urls.filesystem("s3://bucket/x")
    fs.read_timeout = 0.2
    with (
        s3_proxy.inject(hold, lambda r: True) as asked,
        pytest.raises(reinforce.UserError, match=r"cannot be written: ReadTimeoutError.*the address and the cred"),
    ):
        reinforce.run(config("x"))
    assert len(asked) == 2 * S3FS_REQUESTS.count


ROOT = Path(__file__).parents[2]


def second_part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber=2" in request.query


def uploads(s3: s3fs.S3FileSystem, folder: str) -> int:
    """Number of unfinished multipart uploads."""
    listed = s3.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])
    return sum(upload["Key"].startswith(folder) for upload in listed)


def kill_at(proxy: Proxy, when: Callable[[Request], bool], code: str, **environment: str) -> None:
    """Run code in a process, and kill it at a request that has no answer."""
    with proxy.inject(hold, when) as reached:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment})
        while not reached:
            assert process.poll() is None, "it ended before its request"
            time.sleep(0.05)
        process.kill()
        process.wait()


def test_a_process_killed_or_an_error_in_the_middle_of_an_upload_leaves_no_object(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy
) -> None:
    kill_at(s3_proxy, second_part, "from tests.helpers.large_object import write; write('killed')")
    with (
        s3_proxy.inject(refuse(400, "InvalidPart"), second_part),
        pytest.raises(StorageError, match=r"bucket/failed/large\.bin cannot be written: OSError"),
    ):
        write("failed")
    assert s3.find("bucket/killed", refresh=True) == s3.find("bucket/failed", refresh=True) == []
    assert uploads(s3, "killed") == 1, "its parts cost money until a lifecycle rule removes them: see docs/clusters.md"
    assert uploads(s3, "failed") == 0


def test_a_process_killed_while_it_puts_a_file_leaves_none_on_its_machine(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, tmp_path: Path
) -> None:
    code = "from reinforce.dataset.store import Store; Store('s3://bucket/put').write_bytes(b'whole', 'file')"
    kill_at(s3_proxy, lambda request: request.method == "PUT", code, TMPDIR=str(tmp_path))
    assert [*tmp_path.iterdir()] == []
    Store("s3://bucket/put").write_bytes(b"whole", "file")
    assert s3.cat("bucket/put/file") == b"whole"
