"""Decode processes that crash, hang or are killed cost one image at most, and nothing else changes."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce.config import parse_config
from reinforce.engine.decode.ahead import decode_ahead
from reinforce.engine.decode.cells import PixelLayout
from reinforce.engine.decode.item import Decoded, DecodeSpec, Outcome, SourceItem
from reinforce.engine.decode.pool import CellLease, DecodePool
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import config_of, picture
from tests.helpers.decode_faults import CrashingSample, FailingSample, OnceCrashingSample
from tests.hostile.images import scan_bomb

CONFIG = parse_config({**config_of("x", "y", captioners={}, teachers={}), "input": {"limits": {"scans": 100_000}}})
SPEC = DecodeSpec(CONFIG, PixelLayout((2, 24)))


def item(number: int, image: bytes | None = None, kind: type[RawSample] = RawSample) -> SourceItem:
    data = picture(number, 40, 30) if image is None else image
    return SourceItem(f"k{number}", kind(f"k{number}", data, 0, len(data), {"txt": b"a caption"}))


def decode_all(pool: DecodePool, items: list[SourceItem]) -> tuple[list[Decoded | Refusal], np.ndarray]:
    """The outcomes of all items, and copies of the crops of those that were decoded."""
    outcomes, crops = [], []
    with pool.lease(SPEC, 64) as lease:
        assert lease.cells.crops is not None
        for _, cell, outcome in decode_ahead(lease, items, window=16):
            outcomes.append(outcome)
            if isinstance(outcome, Decoded):
                crops.append(lease.cells.crops[cell].copy())
                lease.free.release([cell])
        assert len(lease.free) == 64
    return outcomes, np.stack(crops)


@contextmanager
def pool_of(processes: int, seconds: float = 60.0, attempts: int = 2) -> Iterator[DecodePool]:
    with DecodePool(processes, seconds, attempts) as pool:
        pool.wait_until_ready()
        yield pool


def pids(pool: DecodePool) -> list[int]:
    return [server._handle.pid for server in pool._servers if server._handle is not None]


@pytest.fixture(scope="module")
def expected() -> tuple[list[Decoded | Refusal], np.ndarray]:
    with pool_of(1) as pool:
        return decode_all(pool, [item(i) for i in range(40)])


def test_any_number_of_processes_gives_the_same_records_and_pixels(
    expected: tuple[list[Decoded | Refusal], np.ndarray],
) -> None:
    with pool_of(3) as pool:
        outcomes, crops = decode_all(pool, [item(i) for i in range(40)])
        assert pool.finished >= 40
    assert outcomes == expected[0]
    np.testing.assert_array_equal(crops, expected[1])


def test_an_image_that_crashes_its_process_is_refused_and_all_others_are_decoded(
    expected: tuple[list[Decoded | Refusal], np.ndarray],
) -> None:
    items = [item(i, kind=CrashingSample if i in (3, 4, 20) else RawSample) for i in range(40)]
    with pool_of(2) as pool:
        outcomes, crops = decode_all(pool, items)
    refused = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)}
    assert {i: (outcome.key, outcome.reason.value) for i, outcome in refused.items()} == {
        i: (f"k{i}", "image_crashed") for i in (3, 4, 20)
    }
    assert refused[3].detail == "the process that decoded it ended with signal SIGSEGV, 2 times"
    rest = [i for i in range(40) if i not in refused]
    assert [outcomes[i] for i in rest] == [expected[0][i] for i in rest]
    np.testing.assert_array_equal(crops, expected[1][rest])


def test_an_image_whose_process_dies_once_is_decoded_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: tuple[list[Decoded | Refusal], np.ndarray]
) -> None:
    monkeypatch.setenv("TESTS_CRASHED", str(tmp_path / "crashed"))
    items = [item(i, kind=OnceCrashingSample if i == 5 else RawSample) for i in range(40)]
    with pool_of(2) as pool:
        outcomes, crops = decode_all(pool, items)
    assert (tmp_path / "crashed").exists()
    assert outcomes == expected[0]
    np.testing.assert_array_equal(crops, expected[1])


def test_an_image_that_takes_too_long_is_refused_and_all_others_are_decoded(
    expected: tuple[list[Decoded | Refusal], np.ndarray],
) -> None:
    bomb = scan_bomb(4_000)  # takes minutes
    with pool_of(2, seconds=1.0, attempts=1) as pool:
        outcomes, crops = decode_all(pool, [item(i, bomb if i == 7 else None) for i in range(40)])
    refused = outcomes.pop(7)
    assert isinstance(refused, Refusal)
    assert (refused.key, refused.reason.value) == ("k7", "image_hung")
    assert refused.detail == "decoding took longer than failures.sample_seconds = 1, 1 times"
    assert outcomes == [outcome for i, outcome in enumerate(expected[0]) if i != 7]
    np.testing.assert_array_equal(crops, np.delete(expected[1], 7, 0))


def test_processes_that_are_killed_are_replaced(expected: tuple[list[Decoded | Refusal], np.ndarray]) -> None:
    with pool_of(2) as pool:
        for _ in range(3):
            for pid in pids(pool):
                os.kill(pid, signal.SIGKILL)
            outcomes, crops = decode_all(pool, [item(i) for i in range(40)])
            assert outcomes == expected[0]
            np.testing.assert_array_equal(crops, expected[1])


def test_an_unexpected_exception_is_raised_where_the_item_is_due() -> None:
    with pool_of(2) as pool, pytest.raises(RuntimeError, match="ZeroDivisionError: decoders do not do this"):
        decode_all(pool, [item(i, kind=FailingSample if i == 9 else RawSample) for i in range(40)])


def test_a_consumer_that_stops_leaves_no_process_at_its_cells(
    expected: tuple[list[Decoded | Refusal], np.ndarray],
) -> None:
    with pool_of(2) as pool:
        for _ in range(5):
            with pool.lease(SPEC, 64) as lease:
                rows = decode_ahead(lease, (item(100 + i) for i in range(40)), window=16)
                next(rows)
                rows.close()
            outcomes, crops = decode_all(pool, [item(i) for i in range(40)])
            assert outcomes == expected[0]
            np.testing.assert_array_equal(crops, expected[1])


def test_leases_of_two_shards_share_the_processes(expected: tuple[list[Decoded | Refusal], np.ndarray]) -> None:
    with pool_of(2) as pool, pool.lease(SPEC, 64) as one, pool.lease(SPEC, 64) as other:
        assert one.cells.crops is not None
        assert other.cells.crops is not None
        assert not np.shares_memory(one.cells.crops, other.cells.crops)
        streams = [decode_ahead(lease, [item(i) for i in range(40)], 16) for lease in (one, other)]
        for i, pair in enumerate(zip(*streams, strict=True)):
            for (_, cell, outcome), lease in zip(pair, (one, other), strict=True):
                assert outcome == expected[0][i]
                assert lease.cells.crops is not None
                np.testing.assert_array_equal(lease.cells.crops[cell], expected[1][i])


def test_regions_begin_at_pages_so_that_they_can_be_locked() -> None:
    with pool_of(1) as pool:
        for size in (1, 5_000, 4096):
            assert pool.allocate(size).ctypes.data % mmap.PAGESIZE == 0
        outcomes, _ = decode_all(pool, [item(i) for i in range(2)])
    assert all(isinstance(outcome, Decoded) for outcome in outcomes)


def test_closing_ends_the_processes_and_whoever_waits() -> None:
    pool = DecodePool(1)
    pool.wait_until_ready()
    [pid] = pids(pool)
    with pool.lease(SPEC, 8) as lease:
        future: Future[list[Outcome]] = lease.submit([0], [item(0, scan_bomb(4_000))])
        pool.close()
        with pytest.raises(RuntimeError, match="the decode processes were stopped"):
            future.result(timeout=120)
        with pytest.raises(RuntimeError, match="the decode processes were stopped"):
            lease.submit([0], [item(0)])
    assert not Path(f"/proc/{pid}").exists()


PARENT = """
import sys, time
from reinforce.engine.decode.pool import DecodePool
from tests.engine.test_decode_pool import SPEC, item, pids
from tests.hostile.images import scan_bomb
pool = DecodePool(2)
pool.wait_until_ready()
with pool.lease(SPEC, 8) as lease:
    lease.submit([0], [item(0, scan_bomb(4_000))])
    while pool.longest() is None:
        time.sleep(0.01)
    print(*pids(pool), flush=True)
    time.sleep(600)
"""


def test_no_process_outlives_its_parent_not_even_inside_a_decoder() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 120
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_process_is_small_and_imports_neither_torch_nor_ray() -> None:
    with pool_of(1) as pool:
        decode_all(pool, [item(i) for i in range(8)])
        [pid] = pids(pool)
        mapped = Path(f"/proc/{pid}/maps").read_text()
        status = Path(f"/proc/{pid}/status").read_text().split()
    assert "PIL" in mapped
    assert "torch" not in mapped
    assert "/ray/" not in mapped
    assert int(status[status.index("RssAnon:") + 1]) < 100_000, "kB of its own"


def test_a_process_that_is_killed_while_it_starts_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []

    class Killed(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if len(killed) < 2:
                killed.append(self.pid)
                self.kill()

    monkeypatch.setattr(subprocess, "Popen", Killed)
    with pool_of(1) as pool:
        assert [isinstance(outcome, Decoded) for outcome in decode_all(pool, [item(0)])[0]] == [True]
        assert pids(pool)[0] not in killed
    assert len(killed) == 2


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/nonexistent"])
    pool = DecodePool(1)
    with pytest.raises(RuntimeError, match="a decode process does not start: exit status 1"):
        pool.wait_until_ready()
    with pool.lease(SPEC, 8) as lease, pytest.raises(RuntimeError, match="does not start"):
        lease.submit([0], [item(0)]).result(timeout=240)
    pool.close()


def test_a_lease_needs_no_memory_where_no_pixels_are_needed() -> None:
    with pool_of(1) as pool, pool.lease(DecodeSpec(CONFIG, PixelLayout(None)), 8) as lease:
        assert isinstance(lease, CellLease)
        [outcome] = lease.submit([0], [item(0)]).result()
        assert isinstance(outcome, Decoded)
        assert (outcome.width, outcome.height, outcome.caption) == (40, 30, "a caption")


def test_the_images_of_the_oldest_lease_are_decoded_first() -> None:
    order: list[str] = []
    with pool_of(1) as pool, pool.lease(SPEC, 64) as older, pool.lease(SPEC, 64) as younger:
        blocker = younger.submit([0], [item(0, scan_bomb(60))])  # the process is busy while the others are submitted
        jobs = []
        for number, (name, lease) in enumerate([("b", younger), ("b", younger), ("a", older), ("a", older)], 1):
            jobs.append(lease.submit([number], [item(number)]))
            jobs[-1].add_done_callback(lambda _, name=name: order.append(name))
        for job in [blocker, *jobs]:
            job.result(240)
    assert "".join(order) in ("aabb", "baab")  # a process receives one chunk ahead
