"""Decode processes: rows in order and within bounds; a crash, a hang or a kill costs one image at most."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from reinforce.config import parse_config
from reinforce.engine.worker.decode import (
    CellLease,
    Decoded,
    DecodePool,
    DecodeSpec,
    PixelLayout,
    Row,
    RowChunk,
    StoredImage,
)
from reinforce.engine.worker.shard import chunk_rows, decode_ahead
from reinforce.source.config import Limits
from reinforce.source.samples import RawSample, Refusal
from schemas import Reason
from tests.helpers.data import config_of, picture
from tests.helpers.decode_faults import (
    CrashingRecords,
    CrashingSample,
    FailingSample,
    OnceCrashingSample,
    SizedRow,
)
from tests.helpers.waiting import is_alive, wait_for
from tests.hostile.images import scan_bomb

CONFIG = parse_config({**config_of("x", "y", captioners={}, teachers={}), "input": {"limits": Limits(scans=100_000)}})
SPEC = DecodeSpec(CONFIG, PixelLayout((2, 24)))

Found: TypeAlias = tuple[list[Decoded | Refusal], np.ndarray]


def row(number: int, image: bytes | None = None, kind: type[RawSample] = RawSample) -> Row:
    data = picture(number, 40, 30) if image is None else image
    return Row(f"k{number}", sample=kind(f"k{number}", data, 0, len(data), {"txt": b"a caption"}))


def submit(lease: CellLease, row: Row, cell: int = 0) -> Any:
    """The future of the outcome of one row."""
    row.cell = cell
    return lease.pool.submit(RowChunk(lease, [row]))


def decode_all(pool: DecodePool, rows: Sequence[Row]) -> Found:
    """The outcomes of all rows, and copies of the crops of those that were decoded."""
    outcomes, crops = [], []
    with pool.lease(SPEC, 64) as lease:
        for found in decode_ahead(lease, rows, window=16):
            if isinstance(found, Refusal):
                outcomes.append(found)
                continue
            outcomes.append(found.decoded)
            crops.append(lease.cells.crops[found.cell].copy())
            lease.free.release([found.cell])
        assert len(lease.free) == 64
    return outcomes, np.stack(crops)


def assert_equal(found: Found, expected: Found, without: Sequence[int] = ()) -> list[Refusal]:
    """Check all outcomes and crops but those of rows that are refused, which are returned."""
    kept = [i for i in range(len(expected[0])) if i not in without]
    assert [found[0][i] for i in kept] == [expected[0][i] for i in kept]
    np.testing.assert_array_equal(found[1], expected[1][kept])
    return [refused for i in without if isinstance(refused := found[0][i], Refusal)]


@contextmanager
def pool_of(processes: int, seconds: float = 60.0, attempts: int = 2) -> Iterator[DecodePool]:
    with DecodePool(processes, seconds, attempts) as pool:
        pool.wait_until_ready()
        yield pool


def pids(pool: DecodePool) -> list[int]:
    return [server.handle._process.pid for server in pool._servers if server.handle is not None]


@pytest.fixture(scope="module")
def single() -> Iterator[DecodePool]:
    """One process, which many tests share, since each takes CPU to start."""
    with pool_of(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def three() -> Iterator[DecodePool]:
    with pool_of(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def expected(single: DecodePool) -> Found:
    return decode_all(single, [row(i) for i in range(40)])


def test_any_number_of_processes_gives_the_same_records_and_pixels(three: DecodePool, expected: Found) -> None:
    before = three.finished
    assert_equal(decode_all(three, [row(i) for i in range(40)]), expected)
    assert three.finished >= before + 40


@pytest.mark.parametrize(("mebibytes", "most"), [(0, 16), (10, 12), (50, 2), (500, 1)])
def test_rows_are_read_ahead_up_to_a_number_and_a_number_of_bytes(
    single: DecodePool, mebibytes: int, most: int
) -> None:
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for number in range(40):
            read += 1
            yield SizedRow(f"k{number}", sample=row(0).sample, size=mebibytes * 2**20)

    with single.lease(SPEC, 64) as lease:
        furthest = []
        for done, found in enumerate(decode_ahead(lease, rows(), 16), start=1):
            assert found.key == f"k{done - 1}", "in order"
            furthest.append(read - done)
            lease.free.release([found.cell])
    assert max(furthest) == most


def test_refusals_pass_in_order_and_decoded_rows_keep_their_image_without_its_sidecars(single: DecodePool) -> None:
    refusal = Refusal("bad", Reason.NO_IMAGE, "no image")
    with single.lease(SPEC, 64) as lease:
        first, bad, second, worse = decode_ahead(lease, [row(0), refusal, row(1), refusal], 16)
    assert bad == worse == refusal
    for number, found in enumerate((first, second)):
        assert (found.caption, found.sample.image) == ("a caption", picture(number, 40, 30))
        assert found.sample.all_sidecars == {}


def test_chunks_spread_a_window_over_all_processes() -> None:
    assert [chunk_rows(256, 2), chunk_rows(256, 24), chunk_rows(50, 12), chunk_rows(4, 8)] == [8, 5, 2, 1]


def test_an_image_that_crashes_its_process_is_refused_and_all_others_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Found
) -> None:
    monkeypatch.setenv("TESTS_CRASHED", str(tmp_path / "crashed"))
    kinds: dict[int, type[RawSample]] = {**dict.fromkeys((3, 4), CrashingSample), 5: OnceCrashingSample}
    with pool_of(2) as pool:
        found = decode_all(pool, [row(i, kind=kinds.get(i, RawSample)) for i in range(40)])
    detail = "the process that decoded it ended with signal SIGSEGV, 2 times"
    refused = assert_equal(found, expected, [3, 4])
    assert refused == [Refusal(f"k{i}", Reason.IMAGE_CRASHED, detail) for i in (3, 4)]
    assert (tmp_path / "crashed").exists(), "an image whose process dies once is decoded by the next"


def test_a_stored_image_that_crashes_its_process_is_unreadable_and_black() -> None:
    with pool_of(1, attempts=1) as pool, pool.lease(SPEC, 64) as lease:
        lease.cells.crops[:] = 7
        [found] = decode_ahead(lease, [Row("a", "its caption", 0, sample=StoredImage(b"", CrashingRecords()))], 16)
        assert (found.unreadable.reason, found.caption) == (Reason.IMAGE_CRASHED, "its caption")
        assert not lease.cells.crops[found.cell].any()


def test_an_unexpected_exception_is_raised_where_the_row_is_due(three: DecodePool) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: decoders do not do this"):
        decode_all(three, [row(i, kind=FailingSample if i == 9 else RawSample) for i in range(40)])


def test_a_consumer_that_stops_leaves_no_process_at_its_cells(three: DecodePool, expected: Found) -> None:
    for _ in range(3):
        with three.lease(SPEC, 64) as lease:
            rows = decode_ahead(lease, (row(100 + i) for i in range(40)), window=16)
            next(rows)
            rows.close()
        assert_equal(decode_all(three, [row(i) for i in range(40)]), expected)


def test_leases_of_two_shards_share_the_processes(three: DecodePool, expected: Found) -> None:
    with three.lease(SPEC, 64) as one, three.lease(SPEC, 64) as other:
        assert not np.shares_memory(one.cells.crops, other.cells.crops)
        streams = [decode_ahead(lease, [row(i) for i in range(40)], 16) for lease in (one, other)]
        for i, pair in enumerate(zip(*streams, strict=True)):
            for found, crops in zip(pair, (one.cells.crops, other.cells.crops), strict=True):
                assert found.decoded == expected[0][i]
                np.testing.assert_array_equal(crops[found.cell], expected[1][i])


def test_regions_begin_at_pages_so_that_they_can_be_locked(single: DecodePool) -> None:
    for size in (1, 5_000, 4096):
        assert single.allocate(size).ctypes.data % mmap.PAGESIZE == 0
    outcomes, _ = decode_all(single, [row(i) for i in range(2)])
    assert all(isinstance(outcome, Decoded) for outcome in outcomes)


def test_closing_ends_the_processes_and_whoever_waits() -> None:
    pool = DecodePool(1)
    pool.wait_until_ready()
    [pid] = pids(pool)
    with pool.lease(SPEC, 8) as lease:
        future = submit(lease, row(0, scan_bomb(4_000, 1024)))
        pool.close()
        with pytest.raises(RuntimeError, match="the decode processes were stopped"):
            future.result(timeout=600)
        with pytest.raises(RuntimeError, match="the decode processes were stopped"):
            submit(lease, row(0))
    assert not Path(f"/proc/{pid}").exists()


PARENT = """
import sys, time
from reinforce.engine.worker.decode import DecodePool
from tests.engine.worker.test_decode_pool import SPEC, pids, row, submit
from tests.hostile.images import scan_bomb
pool = DecodePool(2)
pool.wait_until_ready()
with pool.lease(SPEC, 8) as lease:
    submit(lease, row(0, scan_bomb(4_000, 1024)))
    while pool.longest() is None:
        time.sleep(0.01)
    print(*pids(pool), flush=True)
    time.sleep(600)
"""


def test_no_process_outlives_its_parent_not_even_inside_a_decoder() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    wait_for(lambda: not any(map(is_alive, children)))


def test_a_process_is_small_and_imports_neither_torch_nor_ray(single: DecodePool) -> None:
    decode_all(single, [row(i) for i in range(8)])
    [pid] = pids(single)
    mapped = Path(f"/proc/{pid}/maps").read_text()
    status = Path(f"/proc/{pid}/status").read_text().split()
    assert "PIL" in mapped
    assert "torch" not in mapped
    assert "/ray/" not in mapped
    assert int(status[status.index("RssAnon:") + 1]) < 100_000, "kB of its own"


def test_processes_that_are_killed_also_while_they_start_are_replaced(
    monkeypatch: pytest.MonkeyPatch, expected: Found
) -> None:
    killed = []

    class Killed(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if len(killed) < 2:
                killed.append(self.pid)
                self.kill()

    monkeypatch.setattr(subprocess, "Popen", Killed)
    with pool_of(1) as pool:
        assert len(killed) == 2
        for _ in range(2):
            [pid] = pids(pool)
            os.kill(pid, signal.SIGKILL)
            assert_equal(decode_all(pool, [row(i) for i in range(40)]), expected)


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/nonexistent"])
    pool = DecodePool(1)
    with pytest.raises(RuntimeError, match="a decode process does not start: exit status 1"):
        pool.wait_until_ready()
    with pool.lease(SPEC, 8) as lease, pytest.raises(RuntimeError, match="does not start"):
        submit(lease, row(0)).result(timeout=600)
    pool.close()


def test_the_images_of_the_oldest_lease_are_decoded_first(single: DecodePool) -> None:
    order: list[str] = []
    with single.lease(SPEC, 64) as older, single.lease(SPEC, 64) as younger:
        futures = [submit(younger, row(0, scan_bomb(120, 2048)))]  # the process is busy while the others are submitted
        for number, (name, lease) in enumerate([("b", younger), ("b", younger), ("a", older), ("a", older)], 1):
            futures.append(submit(lease, row(number), number))
            futures[-1].add_done_callback(lambda _, name=name: order.append(name))
        for future in futures:
            future.result(600)
    assert "".join(order) in ("aabb", "baab")  # a process receives one chunk ahead
