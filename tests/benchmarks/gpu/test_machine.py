"""What the benchmark of a GPU finds on a machine, and what it says to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.gpu import machine
from benchmarks.gpu.machine import Check, check_machine


def found(folder: Path, *parts: str) -> dict[str, Check]:
    return {check.name: check for check in check_machine(folder, parts)}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with commands."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def install(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_machine_without_a_card_or_compiler_is_told_what_it_needs(programs: Path) -> None:
    checks = found(programs, "card", "compiler")
    assert "containers with --gpus all" in checks["card"].fix
    assert "apt-get install -y gcc libc6-dev" in checks["C compiler"].fix
    assert str(checks["C compiler"]).startswith("MISSING C compiler: none")


@pytest.mark.parametrize(
    ("driver", "cuda", "fix"),
    [
        ("570.86.15", "'13.0'", "it needs driver 580 or newer"),
        ("580.65.06", "'13.0'", ""),
        ("535.183.01", "'12.6'", ""),
        ("[N/A]", "'12.6'", "it needs driver 525 or newer"),
    ],
)
def test_the_driver_must_suit_the_cuda_of_the_installed_torch(
    programs: Path, monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str, fix: str
) -> None:
    install(programs, "nvidia-smi", f"echo 'NVIDIA H100 80GB HBM3, {driver}, 81559, 4'")
    package = programs / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {cuda}\n")
    monkeypatch.syspath_prepend(programs)
    monkeypatch.delitem(sys.modules, "torch")
    checks = found(programs, "card")
    assert checks["card"].found == "NVIDIA H100 80GB HBM3, 81559 MiB"
    assert f"for CUDA {cuda[1:-1]} of torch 2.13.0" in checks["driver"].found
    assert checks["driver"].fix.startswith(fix)
    assert bool(checks["driver"].fix) == bool(fix)


def test_a_torch_for_cpus_is_named_where_there_is_a_card(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(programs, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 580.65.06, 81559, 40000'")
    monkeypatch.setattr(machine, "_cuda_of_torch", lambda: (None, "torch 2.13.0+cpu"))
    checks = found(programs, "card")
    assert "torch 2.13.0+cpu has no CUDA" in checks["torch"].found
    assert not checks["memory of the card in use"].needed
    assert "another process" in checks["memory of the card in use"].fix


def test_headers_that_a_compiler_does_not_find_are_named(programs: Path) -> None:
    install(programs, "gcc", "cat >/dev/null; echo 'fatal error: Python.h: No such file' >&2; exit 1")
    check = found(programs, "compiler")["Python headers"]
    assert "Python.h: No such file" in check.found
    assert f"python3.{sys.version_info[1]}-dev" in check.fix


def test_little_disk_and_shared_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK", 1e9)
    monkeypatch.setattr(machine, "SHARED", 1e9)
    checks = found(tmp_path / "of" / "later", "disk", "memory")
    assert "1000000000 GB are needed" in checks[f"disk with {tmp_path}"].fix
    assert "--shm-size=8g" in checks["shared memory"].fix
