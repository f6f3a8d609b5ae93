"""The cores that there are, and the numbers that follow from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

CPU_16 = [{"CPU": 16.0, "memory": 64e9}]
H100_8 = [{"CPU": 96.0, "GPU": 8.0}]


def test_no_more_cores_than_the_affinity_allows() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("lines", "folder", "files", "quotas"),
    [
        ("0::/pod/box\n", "pod/box", {"cpu__max": "250000 100000\n"}, [2.5]),
        ("0::/pod/box\n", "pod", {"cpu__max": "400000 100000\n"}, [4.0]),
        ("0::/pod/box\n", "pod/box", {"cpu__max": "max 100000\n"}, []),
        ("0::/of/the/host\n", ".", {"cpu__max": "50000 100000\n"}, [0.5]),
        ("4:cpu,cpuacct:/box\n", "cpu,cpuacct/box", {"cpu__cfs_quota_us": "30", "cpu__cfs_period_us": "x"}, []),
        ("4:cpu,cpuacct:/box\n", "cpu,cpuacct/box", {"cpu__cfs_quota_us": "30", "cpu__cfs_period_us": "10"}, [3]),
        ("4:cpu:/\n3:memory:/box\n", "cpu", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, []),
    ],
)  # fmt: skip
def test_quotas_of_control_groups_and_of_their_parents_count(
    tmp_path: Path, lines: str, folder: str, files: dict[str, str], quotas: list[float]
) -> None:
    (tmp_path / "cgroup").write_text(lines)
    group(tmp_path / "mount" / folder, **files)
    assert cpu_quotas(tmp_path / "cgroup", tmp_path / "mount") == quotas
    assert cpu_quotas(tmp_path / "absent", tmp_path / "mount") == []


@pytest.mark.parametrize(("ranks", "cores"), [(1, 16), (2, 8), (3, 5), (4, 4), (16, 1), (17, 1)])
def test_on_sixteen_cores_ranks_and_trials_share_all_of_them(ranks: int, cores: int) -> None:
    assert cores_per_process(CPU_16, ranks, 0) == cores


def test_processes_fit_on_the_nodes_of_a_cluster_not_on_their_sum() -> None:
    assert cores_per_process([{"CPU": 0}, {"CPU": 12}, {"CPU": 8}], 3, 0) == 6
    assert cores_per_process([], 4, 0) == 1


def test_with_accelerators_each_has_its_part_of_its_nodes_cores() -> None:
    assert cores_per_process(H100_8, 1, 1.0) == cores_per_process(H100_8, 8, 1.0) == 12
    assert cores_per_process([*H100_8, {"CPU": 16.0, "GPU": 2.0}, *CPU_16], 10, 1.0) == 8
    assert cores_per_process([{"CPU": 2.0, "GPU": 4.0}], 1, 1.0) == 1
    assert cores_per_process(H100_8, 16, 0.5) == 6
    assert cores_per_process(CPU_16, 1, 1.0) == 1
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
    assert [describe_share(*share) for share in ((1, 0), (12, 1), (6, 0.5), (8, 2))] == [
        "1 CPU",
        "12 CPUs and 1 GPU",
        "6 CPUs and 0.5 GPUs",
        "8 CPUs and 2 GPUs",
    ]


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


def test_the_command_line_sets_it_before_torch_is_imported() -> None:
    code = "import sys, reinforce.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
