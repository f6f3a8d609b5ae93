"""Processes: their cores and threads, shared memory, signals, bounded maps, and what is tried again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reinforce.processes import signals
from reinforce.processes.attempts import Attempts, prefetch
from reinforce.processes.children import SharedMemory
from reinforce.processes.cores import (
    arithmetic_threads,
    available_cores,
    capacity,
    cores_per_process,
    cpu_quotas,
    default_gpus,
    describe_share,
    let_waiting_threads_sleep,
    loader_processes,
)
from reinforce.processes.signals import ends_after_sigterm, stop_requests

CPU_16 = [{"CPU": 16.0, "memory": 64e9}]
H100_8 = [{"CPU": 96.0, "GPU": 8.0}]


@pytest.mark.parametrize(
    ("lines", "folder", "files", "quotas"),
    [
        ("0::/pod/box\n", "pod/box", {"cpu.max": "250000 100000\n"}, [2.5]),
        ("0::/pod/box\n", "pod", {"cpu.max": "400000 100000\n"}, [4.0]),
        ("0::/pod/box\n", "pod/box", {"cpu.max": "max 100000\n"}, []),
        ("0::/of/the/host\n", ".", {"cpu.max": "50000 100000\n"}, [0.5]),
        ("4:cpu,cpuacct:/box\n", "cpu,cpuacct/box", {"cpu.cfs_quota_us": "30", "cpu.cfs_period_us": "x"}, []),
        ("4:cpu,cpuacct:/box\n", "cpu,cpuacct/box", {"cpu.cfs_quota_us": "30", "cpu.cfs_period_us": "10"}, [3]),
        ("4:cpu:/\n3:memory:/box\n", "cpu", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, []),
    ],
)  # fmt: skip
def test_quotas_of_control_groups_and_of_their_parents_count(
    tmp_path: Path, lines: str, folder: str, files: dict[str, str], quotas: list[float]
) -> None:
    (tmp_path / "cgroup").write_text(lines)
    (tmp_path / "mount" / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "mount" / folder / name).write_text(text)
    assert cpu_quotas(tmp_path / "cgroup", tmp_path / "mount") == quotas
    assert cpu_quotas(tmp_path / "absent", tmp_path / "mount") == []
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("nodes", "processes", "gpus", "cores"),
    [
        *((CPU_16, ranks, 0, cores) for ranks, cores in ((1, 16), (2, 8), (3, 5), (4, 4), (16, 1), (17, 1))),
        ([{"CPU": 0}, {"CPU": 12}, {"CPU": 8}], 3, 0, 6),
        ([], 4, 0, 1),
        *((H100_8, ranks, 1.0, 12) for ranks in (1, 8)),
        ([*H100_8, {"CPU": 16.0, "GPU": 2.0}, *CPU_16], 10, 1.0, 8),
        ([{"CPU": 2.0, "GPU": 4.0}], 1, 1.0, 1),
        (H100_8, 16, 0.5, 6),
        (CPU_16, 1, 1.0, 1),
    ],
)
def test_processes_fit_on_nodes_and_each_accelerator_has_its_part_of_the_cores(
    nodes: list[dict[str, float]], processes: int, gpus: float, cores: int
) -> None:
    assert cores_per_process(nodes, processes, gpus) == cores


def test_a_gpu_each_is_the_default_where_a_node_has_any() -> None:
    assert (default_gpus(H100_8 + CPU_16), default_gpus(CPU_16), default_gpus([])) == (1, 0, 0)


@pytest.mark.parametrize(
    ("cores", "accelerated", "loaders", "threads"),
    [(1, False, 1, 1), (2, False, 1, 2), (4, False, 1, 4), (16, False, 1, 15), (64, False, 3, 61),
     (1, True, 1, 1), (4, True, 2, 2), (12, True, 8, 4), (16, True, 10, 6), (64, True, 42, 22)],
)  # fmt: skip
def test_threads_and_loader_processes_of_a_rank(cores: int, accelerated: bool, loaders: int, threads: int) -> None:
    assert loader_processes(cores, accelerated) == loaders
    assert arithmetic_threads(cores, loaders, accelerated) == threads


def test_shares_are_described_in_singular_and_plural() -> None:
    found = [describe_share(*share) for share in ((1, 0), (12, 1), (6, 0.5), (8, 2))]
    assert found == ["1 CPU", "12 CPUs and 1 GPU", "6 CPUs and 0.5 GPUs", "8 CPUs and 2 GPUs"]


def test_capacity_counts_processes_that_fit_on_one_node() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 2.0}]
    assert [capacity(nodes, cpus, 0) for cpus in (0.5, 1, 2, 3, 4)] == [10, 5, 2, 1, 0]
    assert [capacity(nodes, cpus, 1) for cpus in (1, 4)] == [1, 0]


def test_waiting_threads_sleep_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    let_waiting_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_waiting_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


# --- shared memory


def test_what_a_child_writes_is_seen_here() -> None:
    memory = SharedMemory(8)
    code = (
        "import sys; from reinforce.processes.children import SharedMemory; "
        "SharedMemory(descriptor=int(sys.argv[1])).array()[3] = 7"
    )
    command = [sys.executable, "-c", code, str(memory.descriptor)]
    subprocess.run(command, check=True, pass_fds=[memory.descriptor])
    assert memory.array().tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
    memory.close()


def test_memory_grows_and_older_arrays_stay_valid() -> None:
    memory = SharedMemory(4)
    before = memory.array()
    memory.resize(10_000)
    memory.array()[:4] = 5
    assert before.tolist() == [5] * 4
    assert memory.size == len(memory.array()) == 10_000
    memory.close()


def test_messages_of_any_length_are_written_and_read() -> None:
    memory = SharedMemory()
    assert len(memory.array()) == 0
    for data in (b"abc", bytes(range(256)) * 5000, b"x"):
        memory.write(data)
        assert memory.read(len(data)) == data
    with pytest.raises(ValueError, match="expected"):
        memory.read(memory.size + 1)
    memory.close()


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_as_a_request_to_stop_and_raises_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as received:
        assert not received
        signal.raise_signal(number)
        assert received == [number]
    assert signal.getsignal(number) is before


def test_a_run_in_another_thread_leaves_signal_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with stop_requests():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(600)
    assert seen == [before]


#: A command that handles SIGTERM, says that it is ready, and waits, for one second after the signal at most.
_COMMAND = """
import os, sys, threading, time
from reinforce.processes import signals
signals._TERMINATION_SECONDS = 1.0
lock = threading.Lock()
lock.acquire()
def hang():
    print("ready", flush=True)
    {wait}
with signals.ends_after_sigterm(program=True), signals.{handled}:
    {call}
"""


@pytest.mark.parametrize(
    ("handled", "wait", "call", "place"),
    [
        pytest.param(
            "handled_signals(signals.StopSignal().request)",
            "time.sleep(60)",
            "hang()",
            "hang",
            id="a call that goes on",
        ),
        pytest.param(
            "stop_requests()",
            "import ctypes; c = ctypes.CDLL(None); m = bytes(64); c.pthread_mutex_lock(m); c.pthread_mutex_lock(m)",
            "hang()",
            "hang", id="a call of C in which no handler runs",
        ),
        pytest.param(
            "terminated_by_exception()", "lock.acquire()", "threading.Thread(target=hang).start(); time.sleep(60)",
            "hang", id="an exit that waits for a thread",
        ),
    ],
)  # fmt: skip
def test_a_process_that_hangs_ends_some_time_after_sigterm_with_one_line_and_status_143(
    handled: str, wait: str, call: str, place: str
) -> None:
    command = [sys.executable, "-c", _COMMAND.format(handled=handled, wait=wait, call=call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=50)
    assert process.returncode == 143
    assert errors.count("\n") == 1
    assert errors.startswith(f"ended 1 s after SIGTERM, because a call did not return: it is in {place} (")


def test_a_process_that_hangs_ends_after_sigterm_also_where_nobody_reads_its_errors() -> None:
    code = _COMMAND.format(handled="stop_requests()", wait="time.sleep(60)", call="hang()")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(50) == 143


def test_a_block_that_ends_after_sigterm_or_whose_child_gets_it_voids_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(signals, "_TERMINATION_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", ends.append)
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with stop_requests() as received:
        signal.raise_signal(signal.SIGTERM)
    with stop_requests() as of_parent:
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(0.5)
    assert (received, of_parent, ends) == ([signal.SIGTERM], [], [])
    with ends_after_sigterm(), stop_requests():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert ends == [143]
    assert signal.set_wakeup_fd(before) == before


# --- maps over threads


def test_items_are_read_ahead_up_to_a_number() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(40):
            read += 1
            yield item

    with ThreadPoolExecutor(2) as pool:
        furthest = []
        for done, result in enumerate(prefetch(pool, int, items(), 16), start=1):
            assert result == done - 1, "in order"
            furthest.append(read - done)
    assert max(furthest) == 16


def test_results_are_in_order_and_all_items_are_computed() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(prefetch(pool, str, range(50), window=7)) == [str(item) for item in range(50)]
        assert list(prefetch(pool, str, [], window=7)) == []


def test_an_error_is_raised_in_place_of_its_result() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = prefetch(pool, lambda item: 6 // item, [3, 2, 0, 1], window=4)
        assert [next(results), next(results)] == [2, 3]
        with pytest.raises(ZeroDivisionError):
            next(results)


# --- attempts


def test_what_passes_is_tried_again_after_its_pauses_and_the_last_error_is_raised() -> None:
    tried: list[int] = []
    waited: list[float] = []

    def fail() -> None:
        tried.append(len(tried))
        raise OSError(len(tried))

    def wait(error: Exception, pause: float) -> None:
        waited.append(pause)

    with pytest.raises(OSError, match="3"):
        Attempts(3, (0.5, 2.0)).call(fail, wait=wait)
    assert (tried, waited) == ([0, 1, 2], [0.5, 2.0])
    with pytest.raises(OSError, match="4"):
        Attempts(3).call(fail, lambda error: error.args != (4,), wait)
    with pytest.raises(OSError, match="5"):
        Attempts(3, within=-1.0).call(fail, wait=wait)
    assert len(waited) == 2
    assert Attempts(5).call(lambda: len(tried), wait=wait) == 5
